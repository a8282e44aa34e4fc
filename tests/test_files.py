import errno
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pem_lightning.files import (
    MAX_ID,
    check_writable,
    id_to_rgb,
    remove_leftovers,
    replace_file,
    rgb_to_id,
    write_file,
    write_or_warn,
)
from pem_lightning.types import UserError


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = write_file(tmp_path / "folder" / "a.txt", "old")

    def fail():
        with replace_file(path, durable=True) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with replace_file(path, durable=True) as file:
        file.write(b"new")
    assert path.read_text() == "new"


def test_what_cannot_be_written_is_said_or_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="choose another output folder or make room"):
        write_file(tmp_path / "file" / "a.txt", "text")
    with caplog.at_level(logging.WARNING):
        assert not write_or_warn(tmp_path / "file" / "a.txt", "text")
    assert "going on without it" in caplog.text
    assert write_or_warn(tmp_path / "a.txt", "text")


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    keep = [tmp_path / name for name in ("last.ckpt", ".hidden.tmp", "a.12.tmp", ".gitignore")]
    (tmp_path / "folder").mkdir()
    leftover = tmp_path / "folder" / ".last.ckpt.4711.tmp"
    for path in [*keep, leftover]:
        path.write_text("")
    assert remove_leftovers(tmp_path) == [leftover]
    assert sorted(p for p in tmp_path.iterdir() if p.is_file()) == sorted(keep)


def test_a_folder_is_looked_at_before_it_is_made(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*/file/run \(.*file: Not a directory\): choose another"):
        check_writable(tmp_path / "file" / "run")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device.* make room"):
        check_writable(Path("run"))


class TestPanopticPNG:
    @settings(max_examples=30, deadline=None)
    @given(hnp.arrays(np.int32, st.tuples(st.integers(0, 4), st.integers(0, 4)), elements=st.integers(0, MAX_ID)))
    def test_ids_survive_the_way_to_colours_and_back(self, ids):
        assert np.array_equal(rgb_to_id(id_to_rgb(ids)), ids)

    def test_the_layout_is_the_official_one(self, reference):
        assert id_to_rgb(np.array([[1 + 2 * 256 + 3 * 256**2]], np.int32)).tolist() == [[[1, 2, 3]]]
        with Image.open(reference / "panoptic_quality" / "coco_sample" / "panoptic" / "000000142238.png") as image:
            assert 5314498 in rgb_to_id(np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("bad", [-1, MAX_ID + 1])
    def test_ids_that_do_not_fit_are_refused(self, bad):
        with pytest.raises(ValueError, match=str(bad)):
            id_to_rgb(np.array([[bad]], np.int32))
