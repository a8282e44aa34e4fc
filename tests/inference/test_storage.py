"""Addresses of fsspec, with its file system in memory."""

import sys

import fsspec
import pytest
from fsspec.registry import known_implementations

from pem_lightning.images import IMAGE_SUFFIXES, find_images
from pem_lightning.inference.storage import Folder, find_at, open_address, read_at
from pem_lightning.types import UserError
from tests.inference.test_segment_with_ray import write_images


@pytest.fixture(autouse=True)
def memory():
    """Of the whole process, here empty."""
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True)
    return memory


@pytest.mark.parametrize("pattern", ["", "/*.png", "/**/*.png", "/image_01.png"])
def test_the_same_images_are_found_in_the_same_order(memory, tmp_path, pattern):
    images = write_images(tmp_path / "in", count=3)
    write_images(images / "more", count=1)
    (images / "notes.txt").write_text("no image")
    memory.put(str(images), "/found", recursive=True)
    local = find_images(f"{images}{pattern}")
    assert find_at(f"{images}{pattern}", IMAGE_SUFFIXES) == [str(path) for path in local]
    expected = [f"memory:///found/{path.relative_to(images).as_posix()}" for path in local]
    assert find_at(f"memory:///found{pattern}", IMAGE_SUFFIXES) == expected


def test_an_image_is_read_as_from_a_file(memory, tmp_path):
    (path,) = write_images(tmp_path / "in", count=1).iterdir()
    memory.pipe_file("/read/a.png", path.read_bytes())
    memory.pipe_file("/read/b.png", path.read_bytes()[:50])
    photo, local = read_at("memory://read/a.png"), read_at(str(path))
    assert (photo.name, photo.file.name) == ("a", "a.png")
    assert (photo.image == local.image).all()
    with pytest.raises(UserError, match=r"cannot read memory://read/b\.png \(it is truncated\)"):
        read_at("memory://read/b.png")
    with pytest.raises(UserError, match=r"memory://read/c\.png does not exist"):
        read_at("memory://read/c.png")


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_writes_reads_lists_and_deletes(tmp_path, remote):
    folder = Folder("memory://folder/out" if remote else str(tmp_path / "out"))
    assert folder.sizes() == {}
    assert folder.read("a/b.txt") is None
    folder.write("a/b.txt", "é".encode())
    folder.write("c.txt", b"123")
    assert folder.read("a/b.txt") == "é"
    assert folder.sizes() == {"a/b.txt": 2, "c.txt": 3}
    folder.remove(["a/b.txt"])
    assert folder.sizes() == {"c.txt": 3}


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/in", "s3fs"), ("gs://bucket/in", "gcsfs")])
def test_a_missing_package_is_one_line_with_the_cure(monkeypatch, address, package):
    assert known_implementations[address.partition(":")[0]]["class"].startswith(f"{package}.")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{address} needs a package that is missing: pip install {package}") as error:
        open_address(address)
    assert "\n" not in str(error.value)
