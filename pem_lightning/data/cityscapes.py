"""Cityscapes: its classes, and its two official archives read just as they unzip, with no preparation step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int32, UInt
from PIL import Image

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import OnError, SampleTransform, SegmentationDataset
from pem_lightning.data.targets import Task
from pem_lightning.data.transforms import EvalTransform, TrainTransform
from pem_lightning.errors import UserError
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Sample, Segment

# In the order of the official train ids; names, colours and ids as in cityscapesScripts' labels.py.
CITYSCAPES = DatasetInfo(
    "cityscapes",
    (
        ClassInfo("road", (128, 64, 128), False, 7),
        ClassInfo("sidewalk", (244, 35, 232), False, 8),
        ClassInfo("building", (70, 70, 70), False, 11),
        ClassInfo("wall", (102, 102, 156), False, 12),
        ClassInfo("fence", (190, 153, 153), False, 13),
        ClassInfo("pole", (153, 153, 153), False, 17),
        ClassInfo("traffic light", (250, 170, 30), False, 19),
        ClassInfo("traffic sign", (220, 220, 0), False, 20),
        ClassInfo("vegetation", (107, 142, 35), False, 21),
        ClassInfo("terrain", (152, 251, 152), False, 22),
        ClassInfo("sky", (70, 130, 180), False, 23),
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("rider", (255, 0, 0), True, 25),
        ClassInfo("car", (0, 0, 142), True, 26),
        ClassInfo("truck", (0, 0, 70), True, 27),
        ClassInfo("bus", (0, 60, 100), True, 28),
        ClassInfo("train", (0, 80, 100), True, 31),
        ClassInfo("motorcycle", (0, 0, 230), True, 32),
        ClassInfo("bicycle", (119, 11, 32), True, 33),
    ),
)

_CLASS_OF_LABEL = {label: index for index, label in enumerate(CITYSCAPES.official_ids)}
_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_instanceIds.png"
_CURE = (
    "log in at cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
    "and unzip both into dataset.root (or take dataset=synthetic to start now)"
)


class CityscapesDataset(SegmentationDataset):
    """The images of one split with their panoptic annotation, in the order of their names.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: "train" or "val".
        transform: applied to every sample.
        on_error: what an unreadable file does, see `SegmentationDataset`.

    Raises:
        UserError: a folder is missing or empty, or an image and an annotation lack their counterpart.
    """

    def __init__(
        self, root: str | Path, split: str, transform: SampleTransform | None = None, on_error: OnError = "stop"
    ) -> None:
        images = _find(Path(root) / "leftImg8bit" / split, _IMAGE_SUFFIX)
        labels = _find(Path(root) / "gtFine" / split, _LABEL_SUFFIX)
        problems = [f"{images[name]} has no annotation: {_CURE}" for name in sorted(images.keys() - labels.keys())]
        problems += [f"{labels[name]} has no image: {_CURE}" for name in sorted(labels.keys() - images.keys())]
        names = sorted(images.keys() & labels.keys())
        super().__init__(CITYSCAPES, names, problems, transform=transform, on_error=on_error)
        self._files = [(images[name], labels[name]) for name in self.names]

    def files(self, index: int) -> tuple[Path, ...]:
        """Photograph and `instanceIds` map."""
        return self._files[index]

    def read(self, index: int) -> Sample:
        """Decode one item; a segment's id is its value in the file."""
        image_path, label_path = self._files[index]
        image = _read(image_path, lambda file: np.array(file.convert("RGB")))
        values = _read(label_path, np.array)
        if values.shape != image.shape[:2]:
            raise UserError(
                f"{label_path} is no single-channel map of its image's size: unzip gtFine_trainvaltest.zip again"
            )
        panoptic, segments = panoptic_from_instance_ids(values)
        # The channels are a view on the file's own pixel order, which spares a copy of the full image.
        return Sample(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(panoptic), segments, self.names[index])


def panoptic_from_instance_ids(
    values: UInt[np.ndarray, "height width"],
) -> tuple[Int32[np.ndarray, "height width"], tuple[Segment, ...]]:
    """Read an official `instanceIds` map, by the rules of cityscapesScripts' createPanopticImgs.py.

    A value is a label id, or for single things a label id times 1000 plus a number. A thing without a number is a
    crowd; labels that are not evaluated become void. A segment's id is its value in the file.

    Returns:
        The panoptic map and its segments by rising id.
    """
    present = np.unique(values)
    segments = []
    for value in present.tolist():
        numbered = value >= 1000
        class_id = _CLASS_OF_LABEL.get(value // 1000 if numbered else value)
        if class_id is not None:
            is_thing = CITYSCAPES.classes[class_id].is_thing
            segments.append(Segment(value, class_id, is_thing, is_crowd=is_thing and not numbered))
    table = np.full(int(present[-1]) + 1, VOID_ID, np.int32)
    ids = [segment.id for segment in segments]
    table[ids] = ids
    return table[values], tuple(segments)


def _find(folder: Path, suffix: str) -> dict[str, Path]:
    """All files `<city>/<name><suffix>` by name."""
    files = {path.name.removesuffix(suffix): path for path in folder.glob(f"*/*{suffix}")}
    if not files:
        problem = "has no files" if folder.is_dir() else "does not exist; expected there are files"
        raise UserError(f"{folder} {problem} <city>/*{suffix}: {_CURE}")
    return files


def _read(path: Path, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Decode one PNG, or name it in the error."""
    try:
        with Image.open(path) as file:
            return convert(file)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for truncated and garbled files
        raise UserError(f"cannot read {path} ({error}): unzip its Cityscapes archive again") from error


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes with the paper's augmentation; the defaults are the paper's numbers (batch size over all devices: 32).

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        task: "panoptic", "semantic" or "instance".
        batch_size: training images per device.
        train_transform: the paper's augmentation by default.
        eval_transform: native size by default.
        loading: `num_workers`, `eval_batch_size`; see `SegmentationDataModule`.
    """

    info: ClassVar[DatasetInfo] = CITYSCAPES

    def __init__(
        self,
        root: str | Path = "data/cityscapes",
        task: Task = "panoptic",
        batch_size: int = 32,
        train_transform: SampleTransform | None = None,
        eval_transform: SampleTransform | None = None,
        *,
        num_workers: int = 4,
        eval_batch_size: int = 1,
    ) -> None:
        super().__init__(
            task=task,
            batch_size=batch_size,
            train_transform=train_transform or TrainTransform(),
            eval_transform=eval_transform or EvalTransform(),
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
        )
        self.root = Path(root)

    def make_dataset(self, split: str, transform: SampleTransform) -> CityscapesDataset:
        """One split as a dataset."""
        return CityscapesDataset(self.root, split, transform)
