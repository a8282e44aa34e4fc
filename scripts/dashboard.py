"""Show all runs in the browser with TensorBoard: `python scripts/dashboard.py [RUNS ...] [--port N]`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs, at any depth (default: outputs multirun)")
    parser.add_argument("--port", help="default: 6006, or the next free one")
    arguments = parser.parse_args()
    folders = arguments.runs or [Path("outputs"), Path("multirun")]
    if not any(any(folder.rglob("events.out.tfevents.*")) for folder in folders):
        looked = " or ".join(map(str, folders))
        print(f"error: no runs in {looked}: start one with python train.py (not with logger=csv)", file=sys.stderr)
        return 2
    # Its names must not begin with a slash, nor have the colon of a drive.
    names = [folder.as_posix().split(":")[-1].strip("./") or folder.resolve().name for folder in folders]
    logdir = ",".join(f"{name}:{folder}" for name, folder in zip(names, folders, strict=True))
    command = ["tensorboard.main", "--logdir_spec", logdir, "--reload_interval", "5", "--window_title", "PEM-Lightning"]
    port = [] if arguments.port is None else ["--port", arguments.port]
    program = [sys.executable, "-m", *command, *port]
    if sys.platform == "win32":  # where execv quotes nothing and leaves the console
        return subprocess.call(program)
    os.execv(sys.executable, program)


if __name__ == "__main__":
    sys.exit(main())
