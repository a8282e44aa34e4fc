"""Segment images with an exported network: `python -m pem_lightning.deploy model.onnx photo.jpg --output DIR`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pem_lightning.basic_types import UserError
from pem_lightning.files import same_on_disk

SAVE = ("all", "masks", "overlays")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message}; see --help")


def make_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="pem-run",
        description="Segment images with a file that export.py wrote. Needs NumPy, Pillow and the file's runtime.",
    )
    add = parser.add_argument
    add("model", help="the exported file: .onnx, .xml, .tflite or .pt2")
    add("images", nargs="+", help="images, folders of them, or quoted patterns such as 'photos/*.jpg'")
    add("--output", default="predictions", metavar="DIR", help="folder for the results (predictions)")
    add("--save", default="all", metavar="WHAT", help="all, masks or overlays (all)")
    add("--task", help="panoptic, semantic or instance (the file's own)")
    add("--classes", metavar="A,B", help="names of the classes to keep (all)")
    add("--score-threshold", type=float, default=0.0, metavar="X", help="leave out instances with a lower score (0)")
    add("--object-mask-threshold", type=float, metavar="X", help="leave out queries that are less sure (the file's)")
    add("--overlap-threshold", type=float, metavar="X", help="drop segments that are hidden more than so (the file's)")
    add("--threads", type=int, metavar="N", help="of the CPU (the runtime's own choice)")
    add("--precision", metavar="TYPE", help="float32 or bfloat16; .xml files only (what the file was exported for)")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Segment what the arguments say."""
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return
    options = vars(parser.parse_args(arguments))
    from pem_lightning.basic_types import did_you_mean
    from pem_lightning.deploy.runtime import Runtime
    from pem_lightning.files import check_writable
    from pem_lightning.images import find_images, read_photo
    from pem_lightning.inference.results import write_results

    model, images, output, save, classes = (options.pop(k) for k in ("model", "images", "output", "save", "classes"))
    if save not in SAVE:
        raise UserError(f"there is no --save {save}{did_you_mean(save, SAVE)}; choose one of: {', '.join(SAVE)}")
    files = [path for source in images for path in find_images(source)]
    output = Path(output)
    _check_names(files, output)
    check_writable(output)
    runtime = Runtime(model, classes=None if classes is None else classes.split(","), **options)
    failed: list[Path] = []

    def results() -> Iterator[Any]:
        for path in files:
            try:
                result = runtime.segment(read_photo(path))
            except UserError as error:
                failed.append(path)
                if len(files) == 1:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
            else:
                yield result

    write_results(results(), runtime.task, runtime.info, output, masks=save != "overlays", overlays=save != "masks")
    print(f"{len(files) - len(failed)} of {len(files)} images segmented, results in {output}")
    if failed:
        raise UserError(f"{len(failed)} of {len(files)} files could not be read: repair or remove those named above")


def _check_names(files: Sequence[Path], output: Path) -> None:
    """No result may overwrite another one, or the input."""
    name, times = Counter(same_on_disk(path.stem) for path in files).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} files are named {name}, so their results would overwrite one another: rename them")
    for path in files:
        if path.resolve().parent == (output / "panoptic").resolve():
            raise UserError(f"the result would overwrite {path} itself: choose another output folder")


def main() -> None:
    """The command: exit code 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
