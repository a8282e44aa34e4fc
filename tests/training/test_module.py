"""Training steps of a network of two convolutions: logs, clipping, precision, memory format, compilation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from pem_lightning.types import UserError
from tests.small_training import CLIP, train


@pytest.fixture(scope="module")
def plain():
    return train()


def loops(steps):
    return {"fit_loop": {"epoch_loop.manual_optimization.optim_step_progress": {"total": {"completed": steps}}}}


def test_a_step_logs_its_losses_and_moves_the_schedule(plain):
    module, trainer, losses = plain
    assert trainer.global_step == 3  # of the optimiser, with two micro-batches in each
    parts = [trainer.callback_metrics[f"train/loss_{name}"].item() for name in ("ce", "mask", "dice")]
    assert sum(parts) == pytest.approx(trainer.callback_metrics["train/loss"].item()) == pytest.approx(losses[-1])
    assert module.lr_schedulers().last_epoch == 3
    assert losses[-1] < losses[0]


def test_checkpoints_that_counted_steps_otherwise_are_not_resumed(plain):
    module, _, _ = plain
    module.on_load_checkpoint({"global_step": 4, "loops": loops(4), "state_dict": {}})
    with pytest.raises(UserError, match="weights="):
        module.on_load_checkpoint({"global_step": 4, "loops": loops(0)})


def fp16(scale=2.0**10):
    """Lightning takes bfloat16 on the CPU, unless it is given this."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


@pytest.mark.parametrize("fused", [False, True])
def test_in_float16_the_gradient_is_clipped_after_unscaling(plain, fused):
    """Before, it would have been a thousand times as long: the step would be taken with CLIP / 1024."""
    module, trainer, _ = train([fp16()], fused)
    assert set(module.network.seen) == {torch.float16}
    assert trainer.optimizers[0].norms == pytest.approx([CLIP] * 3, rel=1e-3)
    logged = trainer.callback_metrics["train/grad_norm"].item()
    assert logged == pytest.approx(plain[1].callback_metrics["train/grad_norm"].item(), rel=0.1)
    assert logged > 10 * CLIP


@pytest.mark.parametrize("fused", [False, True])
def test_in_float16_an_overflow_takes_no_step_and_halves_the_scale(fused):
    plugin = fp16(scale=2.0**100)
    before = [p.clone() for p in train([fp16()], steps=0)[0].network.parameters()]
    module, _, _ = train([plugin], fused, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.network.parameters(), strict=True))
    assert plugin.scaler.get_scale() == 2.0**99


def test_bfloat16_trains_like_float32(plain):
    module, _, losses = train(precision="bf16-mixed")
    assert set(module.network.seen) == {torch.bfloat16}
    assert losses == pytest.approx(plain[2], rel=0.02)
    assert all(p.dtype == torch.float32 for p in module.network.parameters())


def test_channels_last_changes_the_layout_alone(plain):
    module, _, losses = train(channels_last=True)
    assert losses[0] == pytest.approx(plain[2][0], rel=1e-5)
    assert losses == pytest.approx(plain[2], rel=0.01)  # AdamW makes much of little
    assert module.network.features.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain[0].network.features.weight.is_contiguous()


COMPILED = """
import torch
from torch import nn
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.mask2former_pixel_decoder import MultiScaleDeformableAttention
from tests.models.randomize import build_tiny
from tests.small_training import train

# As graphs, forth and back. Machine code is made of them in tests/inference/test_optimize.py.
compile, modes = torch.compile, []
torch.compile = lambda f, mode, **others: modes.append(mode) or compile(f, backend="aot_eager", **others)
plain, compiled = train()[0], train(compile="default")[0]
torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
assert list(compiled.state_dict()) == list(plain.state_dict())
assert len(plain.network.seen) == 6
assert modes == ["default"]

# All of PEM as one graph.
torch.manual_seed(0)
network = build_tiny(num_layers=1).train()
state = {name: value.clone() for name, value in network.state_dict().items()}
images = torch.randn(2, 3, 64, 64)

def gradients(forward):
    network.load_state_dict(state)
    network.zero_grad()
    out = forward(images)
    sum(o.class_logits.square().mean() + o.mask_logits.square().mean() for o in (out, *out.auxiliary)).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

plain = gradients(network)
torch.testing.assert_close(gradients(compile(network.forward, fullgraph=True, backend="aot_eager")), plain)

# Both deformable operators as one graph, with gradients and without.
class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attention = DeformableConv(8, 8), MultiScaleDeformableAttention(8, 2, 1, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.attention(x, torch.full((x.shape[1], 2), 0.3), x, [(6, 7)])

network, x = Both().eval(), torch.randn(2, 8, 6, 7)
for context in (torch.no_grad(), torch.enable_grad()):
    with context:
        torch.testing.assert_close(compile(network, fullgraph=True, backend="eager")(x), network(x))
"""


@pytest.mark.slow
def test_compiled_like_plain():
    """In a process without the tests' checks of shapes, which `torch.compile` cannot compile."""
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def too_large(limit):
    """A hook that raises what CUDA does when more images than `limit` run through the network at once."""

    def forward(module, inputs, output):
        if len(inputs[0]) > limit:
            module.features.bias.grad = torch.ones(8)  # of a pass that got as far as that
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory")

    return forward


def test_micro_batches_that_do_not_fit_are_cut_as_if_nothing_had_happened(plain, caplog):
    """Same losses, and so the same random points, as with the two micro-batches that it ends with."""
    caplog.set_level("INFO")
    found, _, losses = train(micro_batches=1, fit_memory=True, hook=too_large(2))
    assert found.micro_batches == 2
    assert losses == plain[2]
    assert [r.message for r in caplog.records if "memory" in r.message] == [
        "memory is too small for micro-batches of 4: going on with 2"
    ]
    checkpoint = {}
    found.on_save_checkpoint(checkpoint)
    again, _, _ = train(micro_batches=1, fit_memory=True, steps=0)
    again.on_load_checkpoint({**checkpoint, "global_step": 3, "loops": loops(3), "state_dict": {}})
    assert again.micro_batches == 2


@pytest.mark.parametrize(
    ("limit", "fit_memory", "message"),
    [
        (1, True, r"a micro-batch of 2 images needs more memory .*: lower recipe\.train_transform\.crop_size"),
        (
            2,
            False,
            r"a micro-batch of 4 images needs more memory .*: lower recipe\.micro_batch_size, or set it to auto",
        ),
    ],
)
def test_too_little_memory_is_one_line(limit, fit_memory, message):
    with pytest.raises(UserError, match=message):
        train(micro_batches=1, fit_memory=fit_memory, hook=too_large(limit))
