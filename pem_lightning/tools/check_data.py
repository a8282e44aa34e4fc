"""Check a data set before training: `python scripts/check_data.py dataset=cityscapes dataset.root=...`.

Reads every file of both splits, prints a table of classes and every problem with its cure, and writes
`gallery_train.png`, `gallery_val.png` and `report.json`. Exit code 0: all is well, 1: problems, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console
from rich.table import Table

from pem_lightning.cli.errors import compose, user_error_behind
from pem_lightning.cli.overrides import literal_paths
from pem_lightning.data import SegmentationDataModule
from pem_lightning.data.check import SplitCheck, check_split
from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.files import write_file
from pem_lightning.inference.visualize import overlay_panoptic, side_by_side
from pem_lightning.installation import CONF, tool_command
from pem_lightning.types import DatasetInfo, Sample, UserError

TILE = (320, 400)
"""Largest height and width of one picture of the gallery."""
COLUMNS = 4
SHOWN = 20
"""So many problems of one split are printed; the report has them all."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=tool_command("check_data"), description="Check a data set before training.")
    parser.add_argument("overrides", nargs="*", help="the experiment's, as for train.py: dataset=... task=...")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="reading processes; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("data_check"), help="folder of gallery and report")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        return check(parsed.overrides, max(parsed.workers, 0), parsed.output)
    except Exception as error:
        message = user_error_behind(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def check(overrides: list[str], workers: int, output: Path) -> int:
    """Check both splits, print and write what was found; returns the exit code."""
    datamodule, num_queries = build_datamodule(overrides)
    console = Console()
    results: list[SplitCheck] = []
    for split in ("train", "val"):
        try:
            dataset = datamodule.make_dataset(split, datamodule.eval_transform)
        except UserError as error:
            results.append(SplitCheck(split, datamodule.info, problems=[str(error)]))
            continue
        results.append(check_split(dataset, split, workers, task=datamodule.task, num_queries=num_queries))
        if results[-1].gallery:
            gallery(dataset, results[-1].gallery).save(picture := io.BytesIO(), "PNG")
            write_file(output / f"gallery_{split}.png", picture.getvalue())
    for result in results:
        show(result, console)
    write_file(output / "report.json", json.dumps({r.split: r.to_dict() for r in results}, indent=2) + "\n")
    problems = sum(len(result.problems) for result in results)
    images = sum(result.images for result in results)
    verdict = f"{problems} problem(s)" if problems else "no problem"
    console.print(f"{images} images checked, {verdict}; report and galleries are in {output}", soft_wrap=True)
    return 1 if problems else 0


def build_datamodule(overrides: list[str]) -> tuple[SegmentationDataModule, int | None]:
    """The data of a training, and its number of queries."""
    overrides = literal_paths(overrides)
    compose("train", overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", ["output_dir=.", *overrides])
    datamodule = instantiate(cfg.dataset.datamodule, on_error="collect")
    datamodule.prepare_data()
    return datamodule, cfg.network.get("num_queries")


def class_table(result: SplitCheck) -> Table:
    """Pixels, segments and images by class."""
    table = Table("class", title=f"{result.info.name}, {result.split}: {result.images} images")
    for column in ("pixels", "share", "segments", "images"):
        table.add_column(column, justify="right", no_wrap=True)
    for k, name in enumerate(result.info.class_names):
        share = result.pixels[k] / max(result.total_pixels, 1)
        counts = (f"{result.pixels[k]:,}", f"{share:.2%}", f"{result.segments[k]:,}", f"{result.images_with[k]:,}")
        table.add_row(name, *counts, style=None if result.images_with[k] else "yellow")  # it never occurs
    table.add_section()
    void = result.total_pixels - result.pixels.total()
    table.add_row("(void)", f"{void:,}", f"{void / max(result.total_pixels, 1):.2%}", "", "")
    return table


def show(result: SplitCheck, console: Console) -> None:
    """Print a table, problems and notes."""
    if result.images:
        console.print(class_table(result))
    lines = [f"problem: {problem}" for problem in result.problems[:SHOWN]]
    if len(result.problems) > SHOWN:
        lines.append(f"... and {len(result.problems) - SHOWN} more problems of {result.split}, all in report.json")
    lines += [f"note: {note}" for note in result.notes]
    for line in lines:
        console.print(line, style="red" if line.startswith("problem") else None, markup=False, soft_wrap=True)


def gallery(dataset: SegmentationDataset, indices: list[int]) -> Image.Image:
    """Overlays with names, in rows."""
    tiles = [tile(dataset.read(index), dataset.info) for index in indices]
    height = max(picture.height for picture in tiles)
    columns = min(COLUMNS, len(tiles))
    sheet = np.full((-(-len(tiles) // columns) * columns, height, TILE[1], 3), 255, np.uint8)
    for place, picture in zip(sheet, tiles, strict=False):
        left = (TILE[1] - picture.width) // 2
        place[: picture.height, left : left + picture.width] = np.array(picture)
    titles = [dataset.names[index] for index in indices] + [""] * (len(sheet) - len(tiles))
    rows = [side_by_side(list(sheet[i : i + columns]), titles[i : i + columns]) for i in range(0, len(sheet), columns)]
    return Image.fromarray(np.concatenate(rows))


def tile(sample: Sample, info: DatasetInfo) -> Image.Image:
    """One overlay that fits into `TILE`. It is drawn at that size, so that the names stay legible."""
    photo = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    scale = min(TILE[0] / photo.height, TILE[1] / photo.width)
    size = max(round(photo.width * scale), 1), max(round(photo.height * scale), 1)
    ids = Image.fromarray(sample.panoptic.numpy()).resize(size, Image.Resampling.NEAREST)
    image = np.array(photo.resize(size, Image.Resampling.LANCZOS))
    return Image.fromarray(overlay_panoptic(image, torch.from_numpy(np.array(ids)), sample.segments, info))
