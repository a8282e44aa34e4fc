"""Steps of a pipeline side by side: reading, the network and drawing need different parts of a machine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def made_ahead(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Lets a thread take items from an iterable, a few ahead of who uses them.

    Args:
        items: are taken in order, by one thread. What it raises is raised where the items are used.
        depth: at most so many wait to be used.

    Yields:
        The items. Outside of the `with` the thread runs no longer, so that what `items` reads from may be closed.
    """
    waiting: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    abandoned = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> None:
        while not abandoned.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if abandoned.is_set():
                    return
            put(None)
        except BaseException as error:  # belongs to the other thread, whatever it is
            put(error)

    def taken() -> Generator[T]:
        while (entry := waiting.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        abandoned.set()
        thread.join()
