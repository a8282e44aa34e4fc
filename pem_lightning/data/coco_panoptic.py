"""Any data set in the COCO panoptic format: a JSON, a folder of PNGs whose colours are segment ids, and the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pem_lightning.data.coco_json import (
    PanopticIndex,
    check_same_classes,
    classes_of,
    read_panoptic_json,
    renumbered,
)
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import OnError, SampleTransform, SegmentationDataset, make_sample, read_pair
from pem_lightning.data.defaults import resized_to_crops, square_crops
from pem_lightning.data.targets import Task
from pem_lightning.errors import UserError
from pem_lightning.panoptic_png import rgb_to_id
from pem_lightning.types import DatasetInfo, Sample, Segment

_CURE = "check dataset.root, and the keys dataset.train_* and dataset.val_*"


class CocoPanopticDataset(SegmentationDataset):
    """The images of one JSON with their panoptic annotation, in the order of its list of images.

    Segments are numbered 1, 2, ... as the JSON lists them, instead of by their ids of up to 24 bits. Areas and boxes of
    the JSON are not used. A listed segment may have no pixels.

    Args:
        annotation: the JSON.
        images: the folder that its images' file names are relative to.
        maps: the folder of PNGs; named like the JSON by default.
        info: the classes that the file must have; by default those it has, named after its file.
        cure: what the user can do about a file that is missing or broken.
        transform: applied to every sample.
        on_error: what an unreadable file or a wrong entry does, see `SegmentationDataset`.

    Raises:
        UserError: the JSON is missing or not in the format, or files or entries lack their counterpart.
    """

    def __init__(
        self,
        annotation: str | Path,
        images: str | Path,
        maps: str | Path | None = None,
        *,
        info: DatasetInfo | None = None,
        cure: str = _CURE,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        path = Path(annotation)
        content = read_panoptic_json(path, cure)
        found = classes_of(content, path, path.stem)
        if info is not None:
            check_same_classes(found, info, path)
        entries = PanopticIndex(content, path, found)
        folders = Path(images), Path(maps) if maps else path.with_suffix("")
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} does not exist: {cure}")
        self._entries, self._image_folder, self._map_folder = entries, *folders
        self._cure = cure
        self.common_files = (path,)
        self._kept = []  # positions in the JSON
        problems = list(entries.problems)
        for index in range(len(entries.names)):
            missing = [path for path in self._paths(index) if not path.is_file()]
            problems += [f"{path} does not exist: {cure}" for path in missing]
            if not missing:
                self._kept.append(index)
        names = [entries.names[index] for index in self._kept]
        ids = {image["file_name"]: image.get("id") for image in content["images"]}
        self.image_ids = {entries.names[index]: ids[entries.images[index]] for index in self._kept}
        super().__init__(info or found, names, problems, transform=transform, on_error=on_error)
        if not names:
            raise UserError(f"{path} annotates no image that is there: {cure}")

    def files(self, index: int) -> tuple[Path, Path]:
        """Image and PNG."""
        return self._paths(self._kept[index])

    def read(self, index: int) -> Sample:
        """Decode one item."""
        image_path, map_path = self.files(index)
        image, colors = read_pair(image_path, map_path, self._cure, colored=True)
        ids, class_ids, crowds = self._entries.segments(self._kept[index])
        panoptic, unknown = renumbered(rgb_to_id(colors), ids)
        if unknown.size:
            raise UserError(
                f"{map_path} has the segment id {unknown[0]}, which its entry in the JSON does not list: {self._cure}"
            )
        things = self.info.thing_classes
        described = zip(class_ids.tolist(), crowds.tolist(), strict=True)
        segments = [Segment(n, c, c in things, is_crowd=crowd) for n, (c, crowd) in enumerate(described, start=1)]
        return make_sample(image, panoptic, segments, self.names[index])

    def _paths(self, position: int) -> tuple[Path, Path]:
        entries = self._entries
        return self._image_folder / entries.images[position], self._map_folder / entries.maps[position]


class CocoPanopticDataModule(SegmentationDataModule):
    """A data set in the COCO panoptic format; classes are the categories of its validation JSON.

    Args:
        root: the folder that all others are relative to. The defaults are COCO's own names.
        task: "panoptic", "semantic" or "instance".
        batch_size: training images per device.
        train_transform: by default crops of 640x640, see `square_crops`.
        eval_transform: by default the shortest edge becomes 640.
        train_json: the annotation of the training images.
        train_maps: their PNGs; by default the folder named like the JSON.
        train_images: their folder.
        val_json: the annotation of the validation images.
        val_maps: their PNGs; by default the folder named like the JSON.
        val_images: their folder.
        loading: how; see `SegmentationDataModule`.

    Raises:
        UserError: there is no validation JSON, or it is not in the format.
    """

    def __init__(
        self,
        root: str | Path = "data/coco",
        task: Task = "panoptic",
        batch_size: int = 16,
        train_transform: SampleTransform | None = None,
        eval_transform: SampleTransform | None = None,
        *,
        train_json: str = "annotations/panoptic_train2017.json",
        train_maps: str | None = None,
        train_images: str = "train2017",
        val_json: str = "annotations/panoptic_val2017.json",
        val_maps: str | None = None,
        val_images: str = "val2017",
        **loading: Any,
    ) -> None:
        super().__init__(
            task=task,
            batch_size=batch_size,
            train_transform=train_transform or square_crops(640),
            eval_transform=eval_transform or resized_to_crops(640),
            **loading,
        )
        self.root = Path(root)
        self.places = {"train": (train_json, train_images, train_maps), "val": (val_json, val_images, val_maps)}
        content = read_panoptic_json(self.root / val_json, _CURE)
        self.info = classes_of(content, self.root / val_json, "coco_panoptic")

    def make_dataset(self, split: str, transform: SampleTransform | None) -> CocoPanopticDataset:
        """One split as a dataset.

        Raises:
            UserError: files are missing, or the categories are not those of the validation JSON.
        """
        annotation, images, maps = self.places[split]
        return CocoPanopticDataset(
            self.root / annotation,
            self.root / images,
            maps and self.root / maps,
            info=self.info,
            transform=transform,
            on_error=self.on_error,
        )
