"""Predictions of an evaluation as files, in the formats that official servers and tools take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from pem_lightning.data import SegmentationDataModule
from pem_lightning.errors import UserError
from pem_lightning.files import write_file
from pem_lightning.inference.results import coco_instance, encode_png, official_class_map, segments_info
from pem_lightning.module import PEMModule
from pem_lightning.panoptic_png import id_to_rgb
from pem_lightning.types import Batch

_JSON = {"panoptic": ("panoptic.json", '{"annotations": [', "]}"), "instance": ("instances.json", "[", "]")}
"""By task: name, beginning and end of the file with all entries; the semantic task has none."""


class SavePredictions(Callback):
    """Writes every image's prediction as soon as there is one, and what describes all of them last.

    | task | files |
    |---|---|
    | semantic | `semantic/<name>.png`: official class ids; named as the data set's server wants it |
    | panoptic | `panoptic/<name>.png` with ids as colours, `panoptic.json`: COCO's panoptic results |
    | instance | `instances.json`: COCO's instance results, a list with run-length masks |

    Images and classes have the ids of the data set's own files. Entries of a JSON are lines of
    `<task>.part<process>.jsonl` until all are there; a run that breaks leaves these behind. All processes write into
    the same folder, and the JSON has the order of the data set.

    Args:
        directory: is made if need be; files of an earlier run are overwritten. None writes nothing.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start this process's part.

        Raises:
            UserError: the folder cannot be written.
        """
        task = cast(PEMModule, pl_module).inference.task
        if self.directory is not None and task in _JSON:
            write_file(self._part(task, trainer.global_rank), "")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the images of one batch.

        Raises:
            UserError: a file cannot be written.
        """
        if self.directory is None:
            return
        module, datamodule = cast(PEMModule, pl_module), cast(SegmentationDataModule, cast(Any, trainer).datamodule)
        task, info, dataset = module.inference.task, module.info, datamodule.val_dataset
        for sample, result in zip(batch.samples, outputs["results"], strict=True):
            found, name = result.cpu(), sample.name
            image_id = dataset.image_ids.get(name, name)
            if task == "semantic":
                picture = encode_png(official_class_map(found.semantic, info))
                write_file(self.directory / "semantic" / f"{name}{dataset.prediction_suffix}.png", picture)
            elif task == "panoptic":
                write_file(self.directory / "panoptic" / f"{name}.png", encode_png(id_to_rgb(found.panoptic.numpy())))
                described = segments_info(found.panoptic, found.segments, info)
                entry = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": described}
                self._append(task, trainer.global_rank, [entry])
            else:
                self._append(task, trainer.global_rank, [coco_instance(i, image_id, info) for i in found.instances])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the parts of all processes together.

        Raises:
            UserError: the JSON cannot be written.
        """
        if self.directory is None:
            return
        trainer.strategy.barrier()  # the others' parts are complete
        if not trainer.is_global_zero:
            return
        task = cast(PEMModule, pl_module).inference.task
        if task in _JSON:
            name, begin, end = _JSON[task]
            parts = [self._part(task, rank) for rank in range(trainer.world_size)]
            write_file(self.directory / name, begin + "\n" + ",\n".join(_in_order(parts)) + "\n" + end + "\n")
            for part in parts:
                part.unlink()
        print(f"{'predictions':12} {self.directory}")

    def _part(self, task: str, rank: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{task}.part{rank}.jsonl"

    def _append(self, task: str, rank: int, entries: Sequence[dict[str, Any]]) -> None:
        """Add one image's entries as one line, which may be empty."""
        path = self._part(task, rank)
        try:
            with path.open("a") as file:
                file.write(", ".join(map(json.dumps, entries)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another folder or make room") from error


def _in_order(parts: Sequence[Path]) -> Iterator[str]:
    """The lines that are not empty, in the order of the data set: its images are dealt out to the processes in turn."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open()) for part in parts]
        for turn in zip_longest(*files, fillvalue=""):
            yield from filter(None, (line.strip() for line in turn))
