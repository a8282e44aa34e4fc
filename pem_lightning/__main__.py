"""The command `pem`, also `python -m pem_lightning`: every job and tool of the project as a sub-command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib import import_module

JOBS = {
    "train": "train a network: task=, dataset=, backbone=, recipe.KEY=",
    "evaluate": "its metrics: checkpoint=",
    "predict": "segment images, videos, a camera: checkpoint=, input=, output=",
    "export": "a file for other runtimes: checkpoint=, format=, precision=",
    "app": "a local page for photographs and short videos: checkpoint=, port=",
}
"""Hydra's jobs: what comes after the name are overrides and Hydra's options."""
TOOLS = {
    "check-data": "read all files of a data set and report what is wrong: dataset=, dataset.root=",
    "import-data": "annotations of YOLO-seg, LabelMe, CVAT and Pascal VOC",
    "prepare-ade20k": "ADE20K's panoptic annotation",
    "convert-checkpoint": "published weights to ours; a slim checkpoint to give away",
    "evaluate-panoptic": "panoptic quality of files in COCO's format",
}
EXAMPLES = """\
  pem predict checkpoint=camvid input=street.jpg     a network that ships: streets, 11 classes
  pem train                                          on drawn street scenes: minutes, no download
  pem train dataset=semantic_folder dataset.root=my_photos
  pem evaluate checkpoint=outputs/.../best.ckpt
  pem export checkpoint=outputs/.../best.ckpt format=onnx"""


def usage() -> str:
    """One screen."""
    width = max(map(len, (*JOBS, *TOOLS)))
    lines = ["usage: pem COMMAND ...", ""]
    for title, commands in (("jobs (KEY=VALUE changes a setting):", JOBS), ("tools (options as usual):", TOOLS)):
        lines += [title, *(f"  {name:{width}}  {text}" for name, text in commands.items()), ""]
    lines += ["examples:", EXAMPLES, "", "pem COMMAND --help says more; pem train --cfg job prints a whole experiment."]
    return "\n".join(lines)


def main() -> None:
    """Run the sub-command that the command line names; exit code 2 if there is none of that name."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends at once, without a traceback
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in ("-V", "--version"):
        from pem_lightning import __version__

        print(f"pem-lightning {__version__}")
    elif name in JOBS:
        from pem_lightning.cli.launch import main as launch

        launch(name, rest)
    elif name in TOOLS:
        run_tool(import_module(f"pem_lightning.tools.{name.replace('-', '_')}").main, rest)
    else:
        from pem_lightning.basic_types import did_you_mean

        hint = did_you_mean(name, (*JOBS, *TOOLS))
        print(f"error: there is no command {name}{hint}; `pem` alone lists them", file=sys.stderr)
        sys.exit(2)


def run_tool(tool: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> None:
    """Run a tool with these arguments, or the program's, and exit with its code; signals end it in order."""
    from pem_lightning.processes import print_any_character, stop_in_order

    print_any_character()
    with stop_in_order():
        sys.exit(tool(arguments))


if __name__ == "__main__":
    main()
