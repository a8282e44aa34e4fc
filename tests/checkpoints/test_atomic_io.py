import logging
import resource

import pytest
import torch

from pem_lightning.training.resume import AtomicCheckpointIO
from pem_lightning.types import UserError


@pytest.fixture
def disk():
    """Sets how large a file can become, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_old_file_until_there_is_room(tmp_path, disk, caplog):
    plugin, path = AtomicCheckpointIO(), tmp_path / "folder" / "a.ckpt"
    plugin.save_checkpoint({"step": 1}, path)
    large = {"step": 2, "weights": torch.rand(100_000)}
    disk(100_000)
    with caplog.at_level(logging.WARNING):
        plugin.save_checkpoint(large, path)
    disk(resource.RLIM_INFINITY)
    assert f"CANNOT WRITE {path} (File too large)" in caplog.text
    assert plugin.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    with pytest.raises(UserError, match=r"a\.ckpt could not be written \(File too large\): make room, and resume"):
        plugin.check()
    plugin.save_checkpoint(large, path)
    plugin.check()
    assert plugin.load_checkpoint(path, weights_only=True)["step"] == 2


def test_what_cannot_be_pickled_is_an_error(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"bug": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
