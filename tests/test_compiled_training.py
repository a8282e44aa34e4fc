"""torch.compile in training, in processes without the tests' checks of shapes, which it cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pem_lightning.inference.optimize import check_compile
from pem_lightning.types import UserError
from tests.small_training import train

SMALL = """
import torch
from tests.small_training import train

plain, compiled = train()[0], train(compile="default")[0]
torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
assert list(compiled.state_dict()) == list(plain.state_dict())
assert len(plain.network.seen) == 6
"""

WHOLE = """
import torch
from pem_lightning import build_pem

torch.manual_seed(0)
network = build_pem("resnet18", num_classes=19, num_queries=8, num_layers=1).train()
state = {name: value.clone() for name, value in network.state_dict().items()}
images = torch.randn(2, 3, 64, 64)

def gradients(forward):
    network.load_state_dict(state)
    network.zero_grad()
    out = forward(images)
    sum(o.class_logits.square().mean() + o.mask_logits.square().mean() for o in (out, *out.auxiliary)).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

plain = gradients(network)
torch.testing.assert_close(gradients(torch.compile(network.forward, fullgraph=True, backend="aot_eager")), plain)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [pytest.param(SMALL, id="a training"), pytest.param(WHOLE, id="all of PEM at once")]
)
def test_compiled_like_plain(program, tmp_path):
    """The first compiles to machine code, the second proves that the network is one graph, forth and back."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def test_channels_last_changes_the_layout_alone():
    (plain, _, losses), (other, _, others) = train(), train(channels_last=True)
    assert others[0] == pytest.approx(losses[0], rel=1e-5)
    assert others == pytest.approx(losses, rel=0.01)  # AdamW makes much of little
    assert other.network.features.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.network.features.weight.is_contiguous()


def test_settings_that_cannot_be_compiled_name_their_key(monkeypatch):
    with pytest.raises(UserError, match=r"recipe\.compile=fast: choose null"):
        check_compile("recipe.compile", "fast")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"recipe\.compile needs a C\+\+ compiler"):
        check_compile("recipe.compile", "default")
