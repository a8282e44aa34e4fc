"""Puts panels of an evaluation (image, truth, prediction) below one another, as the picture of a README.

    python evaluate.py checkpoint=camvid callbacks.panels.num_images=101 hydra.run.dir=outputs/camvid
    python scripts/join_panels.py docs/camvid.jpg outputs/camvid/panels/step_*_0016E5_{07959,08079}.png

A .png has 256 colours, any other ending is Pillow's. Exit code 2: a file cannot be read or written.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.files import write_file
from pem_lightning.images import read_image
from pem_lightning.types import UserError

GAP = 8


def join(panels: list[Image.Image], width: int) -> Image.Image:
    """One column of pictures of one width, in pixels."""
    rows = [p.resize((width, round(p.height * width / p.width)), Image.Resampling.LANCZOS) for p in panels]
    sheet = Image.new("RGB", (width, sum(row.height + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Puts panels below one another.")
    parser.add_argument("target", metavar="OUT", type=Path, help="the picture to write: .jpg, .webp or .png")
    parser.add_argument("panels", metavar="PANEL", nargs="+", help="of panels/ or worst/ of a run")
    parser.add_argument("--width", type=int, default=1440, help="in pixels (default: 1440)")
    parsed = parser.parse_args(arguments)
    kind = Image.registered_extensions().get(parsed.target.suffix.lower())
    if kind is None or parsed.width < 1:
        parser.error(f"{parsed.target} of width {parsed.width}: give a name such as picture.jpg and a width above 0")
    try:
        sheet = join([Image.fromarray(read_image(path)) for path in parsed.panels], parsed.width)
        buffer = io.BytesIO()
        (sheet.quantize(256) if kind == "PNG" else sheet).save(buffer, kind, quality=85, optimize=True)
        write_file(parsed.target, buffer.getvalue())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {parsed.target}: {sheet.width}x{sheet.height}, {buffer.tell() / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
