"""Two COCO panoptic files, ground truth and prediction, brought together as panopticapi does for its evaluation.

Training data is checked more strictly (`coco_json.PanopticIndex`). Here a file is refused only if panopticapi refuses
it, too, or if its answer would depend on chance; what panopticapi passes over in silence becomes a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from pem_lightning.data.classes import distinct_color
from pem_lightning.data.coco_json import Content, is_file_name, read_panoptic_json, renumbered
from pem_lightning.data.reading import read_map
from pem_lightning.errors import UserError
from pem_lightning.panoptic_png import MAX_ID, rgb_to_id
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Segment

ImageId = int | float | str


class Annotation(NamedTuple):
    """What one of the files says about one image.

    Attributes:
        image_id: as in the file.
        png: the file of its ids.
        segments: those that are listed.
        areas: in pixels by segment id, as far as the file has them.
    """

    image_id: ImageId
    png: Path
    segments: tuple[Segment, ...]
    areas: Mapping[int, float]


class Pair(NamedTuple):
    """The maps of one image, what their ids mean, and what is odd about the ground truth.

    Attributes:
        image_id: as in the files.
        pred_map: predicted segment of every pixel, 1, 2, ... in the order of its list.
        pred_segments: exactly those.
        gt_map: true id of every pixel.
        gt_segments: those that are listed, pixels or not.
        areas: of true segments by their id, as far as the JSON has them.
        stale_areas: how many of them are not the number of pixels.
        has_unlisted: whether `gt_map` has ids that are neither void nor listed.
    """

    image_id: ImageId
    pred_map: Int32[np.ndarray, "height width"]
    pred_segments: tuple[Segment, ...]
    gt_map: Int32[np.ndarray, "height width"]
    gt_segments: tuple[Segment, ...]
    areas: Mapping[int, float]
    stale_areas: int
    has_unlisted: bool


class PanopticPairs:
    """All images of the ground truth with their predictions; a sequence of `Pair`, read on access.

    Categories are the ground truth's. A category that only the prediction uses is an error; a true segment of a
    category that is not listed counts as no segment, though its pixels are not void.

    Attributes:
        info: the categories.
        notes: what was passed over, a message each.

    Args:
        gt_json: the ground truth's annotations.
        pred_json: the prediction's; it needs no other list than "annotations".
        gt_folder: of its PNGs; by default the JSON's path without suffix.
        pred_folder: likewise.

    Raises:
        UserError: a file is missing or not of the format, or an image has no prediction.
    """

    def __init__(
        self, gt_json: Path, pred_json: Path, gt_folder: Path | None = None, pred_folder: Path | None = None
    ) -> None:
        truth = read_panoptic_json(gt_json, "give the ground truth's JSON first", ("annotations", "categories"))
        prediction = read_panoptic_json(pred_json, "give the prediction's JSON second", ("annotations",))
        self.gt_json, self.pred_json = gt_json, pred_json
        self.info = _categories(truth, gt_json)
        self._index = {official_id: index for index, official_id in enumerate(self.info.official_ids)}
        self._gt_folder = _folder(gt_json, gt_folder, "--gt-folder")
        self._pred_folder = _folder(pred_json, pred_folder, "--pred-folder")
        true, predicted = _by_image(truth, gt_json), _by_image(prediction, pred_json)
        if not true:
            raise UserError(f"{gt_json} has no annotations: give the ground truth of at least one image")
        _check_complete(list(true), predicted, gt_json, pred_json)
        self.notes: list[str] = []
        self._truth = [self._read_truth(image_id, entry) for image_id, entry in true.items()]
        self._predictions = [self._read_prediction(image_id, predicted[image_id]) for image_id in true]
        for entry, option in ((self._truth, "--gt-folder"), (self._predictions, "--pred-folder")):
            if missing := [annotation.png for annotation in entry if not annotation.png.is_file()]:
                more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                raise UserError(f"{missing[0]}{more} does not exist: put it there, or give another folder by {option}")
        if extra := len(predicted) - len(true):
            self.notes.append(f"{pred_json}: {extra} image(s) are not in the ground truth and do not count")
        known = sum(len(annotation.segments) for annotation in self._truth)
        if unknown := sum(len(entry["segments_info"]) for entry in true.values()) - known:
            self.notes.append(f"{gt_json}: {unknown} segment(s) have a category_id that no category has; not counted")

    def __len__(self) -> int:
        return len(self._truth)

    def __getitem__(self, index: int) -> Pair:
        """Read the PNGs of one image.

        Raises:
            UserError: a PNG cannot be read or has another size, or the prediction's PNG and JSON do not agree.
        """
        truth, predicted = self._truth[index], self._predictions[index]
        gt_map, ids = _read_ids(truth.png), _read_ids(predicted.png)
        if ids.shape != gt_map.shape:
            height, width = ids.shape
            raise UserError(
                f"{predicted.png} is {width}x{height}, but {truth.png} is {gt_map.shape[1]}x{gt_map.shape[0]}: "
                "write predictions at the ground truth's size"
            )
        pred_map, unlisted = renumbered(ids, np.array([s.id for s in predicted.segments], np.int32))
        if unlisted.size:
            raise UserError(
                f"{predicted.png} has the id {unlisted[0]}, which its entry in {self.pred_json} does not list: "
                f"list every segment there, and give pixels without one the id {VOID_ID}"
            )
        pixels = np.bincount(pred_map.ravel(), minlength=len(predicted.segments) + 1)[1:]
        if not pixels.all():
            raise UserError(
                f"{self.pred_json} lists the segment {predicted.segments[int(pixels.argmin())].id} of image "
                f"{predicted.image_id!r}, which has no pixels in {predicted.png}: list only segments with pixels"
            )
        pred_segments = tuple(s._replace(id=number) for number, s in enumerate(predicted.segments, start=1))
        return Pair(
            truth.image_id, pred_map, pred_segments, gt_map, truth.segments, truth.areas, *_oddities(truth, gt_map)
        )

    def _read_truth(self, image_id: ImageId, entry: Content) -> Annotation:
        place = f"{self.gt_json}: the annotation of image {image_id!r}"
        listed = _segments(entry, place)
        if VOID_ID in listed:
            raise UserError(f"{place} has a segment with the id {VOID_ID}, which is void: renumber it")
        known = {number: s for number, s in listed.items() if _whole(s.get("category_id")) in self._index}
        segments = tuple(self._segment(number, s) for number, s in known.items())
        areas = {number: s["area"] for number, s in known.items() if s.get("area") is not None}
        if wrong := [area for area in areas.values() if not _is_area(area)]:
            raise UserError(f"{place} has a segment with the area {wrong[0]!r}: give its number of pixels")
        png = _png(entry, place, self._gt_folder)
        return Annotation(image_id, png, segments, {number: float(area) for number, area in areas.items()})

    def _read_prediction(self, image_id: ImageId, entry: Content) -> Annotation:
        place = f"{self.pred_json}: the annotation of image {image_id!r}"
        listed = _segments(entry, place)
        for number, segment in listed.items():
            if _whole(segment.get("category_id")) not in self._index:
                raise UserError(
                    f"{place} has the segment {number} with the category_id {segment.get('category_id')!r}, "
                    f"which no category of {self.gt_json} has: use the ground truth's category ids"
                )
        segments = tuple(self._segment(number, s) for number, s in listed.items())
        return Annotation(image_id, _png(entry, place, self._pred_folder), segments, {})

    def _segment(self, number: int, segment: Content) -> Segment:
        class_id = self._index[int(segment["category_id"])]
        return Segment(number, class_id, self.info.classes[class_id].is_thing, segment.get("iscrowd") == 1)


def _categories(content: Content, path: Path) -> DatasetInfo:
    """The classes as panopticapi takes them: names and colours do not matter, and there may be any number."""
    classes = []
    for index, category in enumerate(content["categories"]):
        number = _whole(category.get("id"))
        if number is None or "isthing" not in category:
            raise UserError(f"{path}: category number {index} needs a whole number 'id' and 'isthing' 0 or 1: add them")
        name = str(category.get("name", number))
        classes.append(ClassInfo(name, distinct_color(index), category["isthing"] == 1, number))
    if not classes:
        raise UserError(f"{path} has no categories: list those of the data set")
    repeated, times = Counter(c.official_id for c in classes).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} has the category id {repeated} twice: give every category its own id")
    return DatasetInfo(path.stem, tuple(classes))


def _folder(path: Path, folder: Path | None, option: str) -> Path:
    folder = path.with_suffix("") if folder is None else folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with the PNGs of {path}: give it by {option}")
    return folder


def _by_image(content: Content, path: Path) -> dict[ImageId, Content]:
    entries: dict[ImageId, Content] = {}
    for entry in content["annotations"]:
        image_id = entry.get("image_id")
        if isinstance(image_id, bool) or not isinstance(image_id, ImageId):
            raise UserError(f"{path} has an annotation with the image_id {image_id!r}: give a number or a text")
        if image_id in entries:
            raise UserError(f"{path} annotates image {image_id!r} twice: remove one of the annotations")
        entries[image_id] = entry
    return entries


def _check_complete(
    images: list[ImageId], predicted: Mapping[ImageId, Content], gt_json: Path, pred_json: Path
) -> None:
    missing = [image_id for image_id in images if image_id not in predicted]
    if not missing:
        return
    cure = "predict every image, if need be with an empty segments_info"
    if str(missing[0]) in map(str, predicted):
        cure = "write its image_id as the ground truth does (a number and a text are not equal)"
    more = f" (nor for {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise UserError(f"{pred_json} has no prediction for image {missing[0]!r} of {gt_json}{more}: {cure}")


def _segments(entry: Content, place: str) -> dict[int, Content]:
    """The listed segments by id, in their order."""
    listed: Any = entry.get("segments_info")
    if not isinstance(listed, list) or not all(isinstance(s, dict) for s in listed):
        raise UserError(f"{place} has no list segments_info: add it, empty if the image has no segment")
    segments: dict[int, Content] = {}
    for segment in listed:
        number = _whole(segment.get("id"))
        if number is None or not 0 <= number <= MAX_ID:
            raise UserError(f"{place} has the segment id {segment.get('id')!r}: ids are whole numbers up to {MAX_ID}")
        if number in segments:
            raise UserError(f"{place} has the segment id {number} twice: give every segment its own id")
        segments[number] = segment
    return segments


def _png(entry: Content, place: str, folder: Path) -> Path:
    name = entry.get("file_name")
    if not is_file_name(name) or str(name).splitlines() != [name]:
        raise UserError(f"{place} has the file_name {name!r}: name its PNG")
    return folder / str(name)


def _read_ids(path: Path) -> Int32[np.ndarray, "height width"]:
    values = read_map(path, "write it anew")
    if values.ndim != 3 or values.shape[2] < 3:
        raise UserError(f"{path} has no colours: a segment's id is written as RGB, R + 256 G + 256² B")
    return rgb_to_id(values[..., :3])


def _oddities(truth: Annotation, gt_map: Int32[np.ndarray, "height width"]) -> tuple[int, bool]:
    """How many areas are not the number of pixels, and whether there are ids that no segment has."""
    numbers, unlisted = renumbered(gt_map, np.array([s.id for s in truth.segments], np.int32))
    pixels = np.bincount(numbers.ravel(), minlength=len(truth.segments) + 1)[1:]
    counted = zip(truth.segments, pixels.tolist(), strict=True)
    return sum(truth.areas.get(s.id, count) != count for s, count in counted), bool(unlisted.size)


def _is_area(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53


def _whole(value: Any) -> int | None:
    """A whole number, which JSON may also write as 7.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)
