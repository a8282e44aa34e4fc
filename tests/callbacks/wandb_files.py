"""Reads what Weights & Biases writes offline, which its package has no reader for."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, IDENT = 32768, 7, 7


def records(file: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: protocol buffers in LevelDB's log format (checksum, length, kind of part)."""
    content, at, whole = file.read_bytes(), IDENT, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        if kind == 0 or at + HEADER + length > len(content):
            return
        whole += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # all of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def _items(items) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class OfflineRun:
    """An offline run of Weights & Biases, once it is written to the end; that is later than `finish` returns.

    Args:
        folder: `wandb/offline-run-...`.
    """

    def __init__(self, folder: Path, seconds: float = 60) -> None:
        self.folder = folder
        (file,) = folder.glob("run-*.wandb")
        end = time.monotonic() + seconds
        found = list(records(file))
        while not any(record.HasField("exit") for record in found):
            assert time.monotonic() < end, f"{file} has no end"
            time.sleep(0.1)
            found = list(records(file))
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.artifacts = []
        for record in found:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.name, self.group = record.run.run_id, record.run.display_name, record.run.run_group
                self.config |= _items(record.run.config.update)
            elif kind == "config":
                self.config |= _items(record.config.update)
            elif kind == "history":
                self.history.append(_items(record.history.item))
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)

    def values(self, name: str) -> list[Any]:
        """All values of one key."""
        return [row[name] for row in self.history if name in row]
