"""Writes published weights under our names, as a plain file of tensors that `weights=` reads; makes checkpoints slim.

    python scripts/convert_checkpoint.py R-50.pkl resnet50.pth
    python scripts/convert_checkpoint.py torchvision/resnet50 resnet50.pth    # by name, downloaded
    python scripts/convert_checkpoint.py best.ckpt slim.pth          # evaluates and predicts, cannot be resumed
    python scripts/convert_checkpoint.py best.ckpt slim.safetensors  # the same in another format
    python scripts/convert_checkpoint.py best.ckpt small.ckpt --int8 # for others: weights in 8 bits, no paths of yours

What is accepted is in docs/training.md. Exit code 2: not accepted, or the backbone is not covered; nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pem_lightning.checkpoints import convert_weights
from pem_lightning.installation import tool_command
from pem_lightning.types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=tool_command("convert_checkpoint"), description="Writes published weights under PEM-Lightning's names."
    )
    parser.add_argument("source", metavar="IN", help="a file, or a name such as torchvision/resnet50")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--backbone", metavar="NAME", help="that they are meant for (default: what they look like)")
    parser.add_argument("--int8", action="store_true", help="large weights in 8 bits, and no paths of this machine")
    parsed = parser.parse_args(arguments)
    try:
        report = convert_weights(parsed.source, parsed.target, parsed.backbone, int8=parsed.int8)
        print(report)
        report.check_backbone()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {parsed.target}")
    return 0
