import pytest
import torch

from pem_lightning import build_pem, checkpoints
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.types import UserError
from tests.checkpoint_files import write_checkpoint


def test_our_own_round_trip(tmp_path):
    network = build_pem("resnet18", num_classes=1, num_layers=1)
    write_checkpoint(tmp_path / "a.ckpt", network)
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert (checkpoint.step, checkpoint.config, checkpoint.overrides) == (12, {"a": 1}, ["seed=3"])
    assert checkpoint.info.classes[0].color == (1, 2, 3)
    assert checkpoint.info.thing_classes == {0}
    other = build_pem("resnet18", num_classes=1, num_layers=1)
    checkpoints.load_network(other, checkpoint)
    assert torch.equal(other.backbone.conv1.weight, network.backbone.conv1.weight)


@pytest.mark.parametrize("change", [{"num_classes": 2}, {"num_layers": 2}, {"backbone": "resnet34"}])
def test_a_checkpoint_that_does_not_fit_is_named_with_the_cure(tmp_path, change):
    write_checkpoint(tmp_path / "a.ckpt", build_pem("resnet18", num_classes=1, num_layers=1))
    other = build_pem(**{"backbone": "resnet18", "num_classes": 1, "num_layers": 1, **change})
    with pytest.raises(UserError, match=r"a\.ckpt does not fit .* differences\): use the backbone"):
        checkpoints.load_network(other, read_checkpoint(tmp_path / "a.ckpt"))


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_damaged_and_foreign_files_are_refused(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(path)
    write_checkpoint(path, build_pem("resnet18", num_classes=1, num_layers=1))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a\.ckpt is damaged"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "evil": Malicious()}, path)
    with pytest.raises(UserError, match="not written by train"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
