"""Make ADE20K's panoptic annotation: `python scripts/prepare_ade20k.py data/ADEChallengeData2016 --workers 8`.

Writes `ade20k_panoptic_{train,val}/*.png` and `ade20k_panoptic_{train,val}.json` into the folder. It may be stopped at
any time: what is finished is not made again. Exit code 0: done, 2: something is wrong with the files.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the internet for a newer version
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.data.ade20k_panoptic import SplitSummary, prepare_split
from pem_lightning.types import UserError

SHOWN = 20
"""So many problems of one split are printed."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make ADE20K's panoptic annotation from its semantic and instance maps."
    )
    parser.add_argument("root", type=Path, help="the folder ADEChallengeData2016, with annotations_instance in it")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 for none beside this one"
    )
    parsed = parser.parse_args(arguments)
    try:
        summaries = [prepare_split(parsed.root, split, max(parsed.workers, 0)) for split in ("train", "val")]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    for summary in summaries:
        report(summary)
    return 2 if any(summary.problems for summary in summaries) else 0


def report(summary: SplitSummary) -> None:
    kept = summary.images - summary.made - len(summary.problems)
    print(
        f"{summary.split}: {summary.images} images ({summary.made} made now, {kept} had been made before), "
        f"{summary.things} things and {summary.stuff} stuff segments, {summary.hidden} of them hidden by others, "
        f"{summary.seconds:.0f} s"
    )
    for problem in summary.problems[:SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if summary.problems:
        print(
            f"error: {len(summary.problems)} images of {summary.split} could not be used, its JSON has not been "
            "written: mend the files and run the same command again",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
