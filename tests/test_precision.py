"""Mixed precision: what is clipped is the true gradient, whatever the loss was scaled by."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.small_training import CLIP, train


def fp16(scale=2.0**10):
    """Lightning takes bfloat16 on the CPU, unless it is given this."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_is_clipped_after_unscaling(fused):
    """Before, it would have been a thousand times as long: the step would be taken with CLIP / 1024."""
    module, trainer, _ = train([fp16()], fused)
    assert set(module.network.seen) == {torch.float16}
    norms = trainer.optimizers[0].norms
    assert len(norms) == 3
    assert norms == pytest.approx([CLIP] * 3, rel=1e-3)
    _, in_float32, _ = train(fused=fused)
    logged = trainer.callback_metrics["train/grad_norm"].item()
    assert logged == pytest.approx(in_float32.callback_metrics["train/grad_norm"].item(), rel=0.1)
    assert logged > 10 * CLIP


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_takes_no_step_and_halves_the_scale(fused):
    plugin = fp16(scale=2.0**100)
    before = [p.clone() for p in (train([fp16()], steps=0)[0]).network.parameters()]
    module, _, _ = train([plugin], fused, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.network.parameters(), strict=True))
    assert plugin.scaler.get_scale() == 2.0**99


def test_bfloat16_trains_like_float32():
    _, _, expected = train()
    module, _, losses = train(precision="bf16-mixed")
    assert set(module.network.seen) == {torch.bfloat16}
    assert losses == pytest.approx(expected, rel=0.02)
    assert all(p.dtype == torch.float32 for p in module.network.parameters())
