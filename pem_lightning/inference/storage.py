"""Images and folders by address: a local path, or whatever fsspec reaches (s3://, gs://, ...). Needs no PyTorch."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from pem_lightning.basic_types import UserError
from pem_lightning.files import write_file
from pem_lightning.images import Photo, find_images, read_photo


def open_address(address: str) -> tuple[Any, str]:
    """The file system of fsspec behind an address or a local path, and the path there.

    Raises:
        UserError: there is no such file system, or it needs a package that is missing.
    """
    if "://" not in address:
        return LocalFileSystem(), str(Path(address).expanduser().absolute())
    with _explained("open", address):
        return fsspec.url_to_fs(address)


def find_at(source: str, suffixes: Collection[str]) -> list[str]:
    """As `images.find_images`, also at an address; returns absolute paths or addresses.

    Raises:
        UserError: there is nothing, or it cannot be listed.
    """
    fs, path = open_address(source)
    if isinstance(fs, LocalFileSystem):
        return [str(found.absolute()) for found in find_images(path, suffixes)]
    with _explained("list", source):
        if fs.isfile(path):
            return [source]
        entries = fs.glob(path, detail=True).values() if glob.has_magic(path) else fs.ls(path, detail=True)
        files = (PurePosixPath(entry["name"]) for entry in entries if entry["type"] == "file")
        found = sorted(file for file in files if file.suffix.lower() in suffixes)
    if not found:
        raise UserError(f"no images in {source}: expected files that end in {', '.join(sorted(suffixes))}")
    return [fs.unstrip_protocol(str(file)) for file in found]


def read_at(address: str) -> Photo:
    """As `images.read_photo`, also from an address; `file` is the path in its file system.

    Raises:
        UserError: it cannot be read, or is not a complete image.
    """
    fs, path = open_address(address)
    if isinstance(fs, LocalFileSystem):
        return read_photo(Path(path))
    with TemporaryDirectory() as folder:
        copy = Path(folder, PurePosixPath(path).name)
        with _explained("read", address):
            fs.get_file(path, str(copy))
        try:
            return read_photo(copy)._replace(file=Path(path))
        except UserError as error:
            raise UserError(str(error).replace(str(copy), address)) from error


class Folder:
    """A folder, local or at an address, for whole files; they are named by their paths seen from it.

    Raises:
        UserError: as `open_address`; and of every method, something cannot be read or written.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.fs, self.path = open_address(address)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write a file at once: none is ever half there."""
        if self.is_local:
            write_file(Path(self._at(name)), content)
            return
        with _explained("write", f"{self.address}/{name}"):
            self.fs.pipe_file(self._at(name), content)

    def read(self, name: str) -> str | None:
        """A file's text; None if there is none."""
        with _explained("read", f"{self.address}/{name}"):
            try:
                return self.fs.cat_file(self._at(name)).decode()
            except FileNotFoundError:
                return None

    def sizes(self) -> dict[str, int]:
        """All files, also those of folders inside, and how many bytes they have."""
        with _explained("list", self.address):
            self.fs.invalidate_cache()
            found = self.fs.find(self.path, detail=True)
        start = len(self._at(""))
        return {name[start:]: entry["size"] for name, entry in found.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Delete files."""
        with _explained("delete in", self.address):
            self.fs.rm([self._at(name) for name in names])


@contextmanager
def _explained(doing: str, address: str) -> Iterator[None]:
    """One line for whatever a file system raises."""
    try:
        yield
    except ImportError as error:
        module = known_implementations.get(address.partition("://")[0], {}).get("class", "fsspec").partition(".")[0]
        cure = str(error) if module == "fsspec" else f"pip install {module} on every machine"
        raise UserError(f"{address} needs a package that is missing: {cure}") from error
    except FileNotFoundError as error:
        raise UserError(f"{address} does not exist: check the address") from error
    except Exception as error:  # every file system has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot {doing} {address} ({reason}): check the address and your access to it") from error
