"""Show all runs in the browser: `make dashboard`, or `python scripts/dashboard.py [FOLDER ...] [--port N]`.

TensorBoard reads the event files that every run writes, also while it trains. No account, nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FOLDERS = ("outputs", "multirun")
EVENTS = "events.out.tfevents.*"
COLUMNS = "(settings compared)"
"""A run without curves, which has the columns of the table of runs."""
PINNED = ("val/PQ", "val/mIoU", "val/AP", "train/loss", "train/images_per_second", "train/data_wait_percent")
"""Curves that the page shows above all others."""


def find_runs(folders: Sequence[Path]) -> Iterator[Path]:
    """Folders with event files, the latest first."""
    newest: dict[Path, float] = {}
    for folder in folders:
        for path in folder.rglob(EVENTS):
            newest[path.parent] = max(newest.get(path.parent, 0.0), path.stat().st_mtime)
    yield from sorted(newest, key=lambda run: -newest[run])


def write_columns(runs: Sequence[Path], folder: Path) -> None:
    """Say which settings and metrics the table of runs has; a run's own event files have its rows."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from pem_lightning.callbacks.loggers import experiment, settings_of

    configs = []
    for run in runs:
        with contextlib.suppress(OSError, yaml.YAMLError):
            configs.append(yaml.safe_load((run / ".hydra" / "config.yaml").read_text()))
    metrics = dict.fromkeys(config["task"]["monitor"] for config in configs)
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), summary=experiment([settings_of(c) for c in configs], metrics)))
    writer.close()


def link_folders(folders: Sequence[Path], together: Path) -> None:
    """Bring folders together as links, because TensorBoard looks into one; those that do not exist yet may come."""
    for number, folder in enumerate(folders):
        name = folder.resolve().name
        target = together / (f"{name}_{number}" if (together / name).is_symlink() else name)
        target.symlink_to(folder.resolve())


def free_port(wanted: int, tries: int = 20) -> int:
    """The first port from `wanted` on that nobody listens at."""
    for port in range(wanted, wanted + tries):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    sys.exit(f"error: ports {wanted} to {wanted + tries - 1} are all taken: choose another with PORT=... (--port)")


def address(url: str) -> str:
    """The page with the curves that matter most pinned to its top."""
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    return f"{url}?smoothing=0&pinnedCards={quote(cards, safe=':,/')}#timeseries"


def serve(logdir: Path, port: int) -> str:
    """Start TensorBoard in a thread of its own; returns its address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard import program
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it wants TensorFlow, for profiles
    options = {
        "logdir": logdir,
        "host": "localhost",
        "port": port,
        "reload_interval": 5,  # seconds
        "samples_per_plugin": "scalars=5000,images=100,text=100",
        "window_title": "PEM-Lightning",
    }
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    return board.launch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help=f"with runs, at any depth (default: {' '.join(FOLDERS)})")
    parser.add_argument("--port", type=int, default=6006, help="the next free one is taken if somebody has it")
    arguments = parser.parse_args()
    folders = arguments.folders or [Path(folder) for folder in FOLDERS]
    runs = list(find_runs(folders))
    if not runs:
        looked = " or ".join(str(folder) for folder in folders)
        print(f"error: no runs in {looked}: start one with python train.py (not with logger=csv)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dashboard_") as together:
        link_folders(folders, Path(together))
        write_columns(runs, Path(together) / COLUMNS)
        url = serve(Path(together), free_port(arguments.port))
        print(f"{len(runs)} runs in {', '.join(map(str, folders))}, the latest {runs[0]}")
        print(f"open {url}")
        print(f"or, with losses and quality on top: {address(url)}")
        print("new runs and steps appear by themselves; Ctrl-C ends it", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
