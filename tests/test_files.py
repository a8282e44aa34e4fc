import logging
import os
from pathlib import Path

import pytest

from pem_lightning.files import check_writable, remove_leftovers, replace_file, write_file, write_or_warn
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
    with pytest.raises(UserError, match="file is a file"):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission for"):
        check_writable(Path("run"))
