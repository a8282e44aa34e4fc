"""Data sets in the COCO panoptic format: a JSON, a folder of PNGs whose colours are segment ids, and the images.

Training data (`CocoPanopticDataset`) is checked strictly. Of a ground truth with its prediction (`PanopticPairs`) only
what panopticapi refuses, too, or what it would answer by chance, is refused; what it passes over in silence is noted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    describe_classes,
    distinct_color,
    make_sample,
    read_map,
    read_pair,
)
from pem_lightning.data.transforms import square_transforms
from pem_lightning.files import MAX_ID, rgb_to_id
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Sample, Segment, UserError

Content = Mapping[str, Any]
ImageId = int | float | str

_JSON_HINT = "give a COCO panoptic JSON, see cocodataset.org/#format-data"
FILES_HINT = "check dataset.root, and the keys dataset.train_* and dataset.val_*"


def read_coco_json(
    path: Path, hint: str, lists: Sequence[str] = ("images", "annotations", "categories"), kind: str = "panoptic"
) -> Content:
    """Raises `UserError` if the file is missing (then `hint` ends the message) or no JSON with these lists."""
    format_hint = f"give a COCO {kind} JSON, see cocodataset.org/#format-data"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}): {format_hint}") from error
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: {format_hint}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path} has entries in {key!r} that are no objects: {format_hint}")
    return content


def panoptic_json(info: DatasetInfo, images: Sequence[Content], annotations: Sequence[Content]) -> str:
    """The text of a JSON with a data set's categories."""
    categories = [
        {"id": c.category_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in info.classes
    ]
    return json.dumps({"images": list(images), "annotations": list(annotations), "categories": categories})


class CocoPanopticDataset(SegmentationDataset):
    """The images of one JSON with their panoptic annotation, in the order of its list of images.

    Segments are numbered 1, 2, ... as the JSON lists them, instead of by their ids of up to 24 bits. Areas and boxes of
    the JSON are not used. A listed segment may have no pixels. A wrong entry is treated as an unreadable file.

    Args:
        annotation: the JSON.
        images: the folder that its images' file names are relative to.
        maps: the folder of PNGs; named like the JSON by default.
        info: the classes that the file must have; by default those it has, named after its file.
        hint: what the user can do about a file that is missing or broken.

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
        hint: str = FILES_HINT,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        path = Path(annotation)
        image_folder, map_folder = Path(images), Path(maps) if maps else path.with_suffix("")
        content = read_coco_json(path, hint)
        found = classes_of(content, path, path.stem)
        if info is not None:
            check_same_classes(found, info, path)
        for folder in (image_folder, map_folder):
            if not folder.is_dir():
                raise UserError(f"{folder} does not exist: {hint}")
        class_of = class_indices(found)
        files: dict[str, tuple[Path, ...]] = {}
        problems: list[str] = []
        image_ids, counts = {}, [0]
        segments: list[tuple[int, int, bool]] = []
        for image, entry in _matched(content, path, problems):
            map_name = entry.get("file_name") or str(PurePosixPath(image["file_name"]).with_suffix(".png"))
            try:
                if not is_file_name(map_name):
                    raise ValueError(f"has the file_name {map_name!r}")
                listed = [_described(number, s, class_of) for number, s in _listed(entry, VOID_ID + 1).items()]
            except ValueError as error:
                problems.append(f"{path}: annotation of {image['file_name']} {error}: correct the JSON")
                continue
            pair = image_folder / image["file_name"], map_folder / map_name
            if missing := [f"{file} does not exist: {hint}" for file in pair if not file.is_file()]:
                problems += missing
                continue
            name = "_".join(PurePosixPath(image["file_name"]).with_suffix("").parts)
            if name in files:
                raise UserError(f"{path} has several images named {name}: remove or rename all but one")
            files[name] = pair
            image_ids[name] = image.get("id")
            segments += listed
            counts.append(len(listed))
        super().__init__(info or found, files, problems, transform=transform, on_error=on_error)
        if not files:
            raise UserError(f"{path} annotates no image that is there: {hint}")
        self.common_files = (path,)
        self.image_ids = image_ids
        self._hint = hint
        # An array, because every loading process would get its own copy of millions of Python objects.
        self._segments = np.array(segments, np.int32).reshape(-1, 3)
        self._starts = np.cumsum(counts)

    def read(self, index: int) -> Sample:
        """Decode one item."""
        image, colors = read_pair(self.files(index), self._hint, colored=True)
        listed = self._segments[self._starts[index] : self._starts[index + 1]]
        panoptic, unknown = renumbered(rgb_to_id(colors), listed[:, 0])
        if unknown.size:
            path = self.files(index)[1]
            raise UserError(
                f"{path} has the segment id {unknown[0]}, which its entry in the JSON does not list: {self._hint}"
            )
        things = self.info.thing_classes
        segments = [Segment(n, c, c in things, crowd == 1) for n, (_, c, crowd) in enumerate(listed.tolist(), start=1)]
        return make_sample(image, panoptic, segments, self.names[index])


class CocoPanopticDataModule(SegmentationDataModule):
    """A data set in the COCO panoptic format; its classes are the categories of the validation JSON.

    Paths are relative to `root`. The folders of PNGs are by default named like the JSON.

    Raises:
        UserError: there is no validation JSON, or it is not in the format.
    """

    def __init__(
        self,
        *arguments: Any,
        train_json: str = "annotations/panoptic_train2017.json",
        train_images: str = "train2017",
        val_json: str = "annotations/panoptic_val2017.json",
        val_images: str = "val2017",
        train_maps: str | None = None,
        val_maps: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(*arguments, **loading)
        self.places = {"train": (train_json, train_images, train_maps), "val": (val_json, val_images, val_maps)}
        path = self.root / val_json
        self.info = classes_of(read_coco_json(path, FILES_HINT), path, "coco_panoptic")

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """The paper's for ADE20K."""
        return square_transforms(640)

    def make_dataset(self, split: str, transform: SampleTransform | None) -> CocoPanopticDataset:
        """One split."""
        annotation, images, maps = self.places[split]
        return CocoPanopticDataset(
            self.root / annotation,
            self.root / images,
            maps and self.root / maps,
            info=self.info,
            transform=transform,
            on_error=self.on_error,
        )


def classes_of(content: Content, path: Path, name: str) -> DatasetInfo:
    """The classes, in the order of the file's categories."""
    for category in content["categories"]:
        if category.get("isthing") not in (0, 1):
            raise UserError(f"{path}: category {category.get('name')!r} does not say isthing 0 or 1: {_JSON_HINT}")
    entries = [(c.get("name"), c.get("color"), bool(c["isthing"]), c.get("id")) for c in content["categories"]]
    return describe_classes(name, entries, path)


def class_indices(info: DatasetInfo) -> dict[int | None, int]:
    """Class indices by category id."""
    return {category_id: index for index, category_id in enumerate(info.category_ids)}


def check_same_classes(found: DatasetInfo, expected: DatasetInfo, path: Path) -> None:
    """Raises `UserError` if a file has other categories than the rest of its data set."""
    theirs, ours = ([(c.category_id, c.name, c.is_thing) for c in info.classes] for info in (found, expected))
    if ours != theirs:
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        raise UserError(
            f"{path} has other categories than the rest of {expected.name}, from number {[*same, False].index(False)} "
            "on: all files of a data set need the same, in the same order"
        )


def _matched(content: Content, path: Path, problems: list[str]) -> Iterator[tuple[Content, Content]]:
    """The images with their annotations, in the order of the images; what has no counterpart becomes a problem."""
    annotations = {str(a.get("image_id")): a for a in content["annotations"]}
    if len(annotations) < len(content["annotations"]):
        raise UserError(f"{path} annotates an image twice: remove one of the annotations")
    for image in content["images"]:
        if not is_file_name(image.get("file_name")):
            raise UserError(f"{path} has an image without file_name, or with one that no file can have: {_JSON_HINT}")
        annotation = annotations.pop(str(image.get("id")), None)
        if annotation is None:
            problems.append(f"{path}: {image['file_name']} has no annotation: annotate it or remove the entry")
        else:
            yield image, annotation
    for image_id in annotations:
        problems.append(f"{path}: the annotation of image_id {image_id} has no image: correct the JSON")


def _listed(entry: Content, lowest: int) -> dict[int, Content]:
    """The listed segments of an annotation by id, in their order; what is wrong with them raises `ValueError`."""
    listed: Any = entry.get("segments_info")
    if not isinstance(listed, list) or not all(isinstance(s, dict) for s in listed):
        raise ValueError("has no list segments_info")
    segments: dict[int, Content] = {}
    for segment in listed:
        number = whole_number(segment.get("id"))
        if number is None or not lowest <= number <= MAX_ID:
            raise ValueError(f"has the segment id {segment.get('id')!r}, which is not from {lowest} to {MAX_ID}")
        if number in segments:
            raise ValueError(f"has the segment id {number} twice")
        segments[number] = segment
    return segments


def _described(number: int, segment: Content, class_of: Mapping[int | None, int]) -> tuple[int, int, bool]:
    """Id, class index and crowd flag of a listed segment."""
    class_id = class_of.get(whole_number(segment.get("category_id")))
    if class_id is None:
        raise ValueError(f"has the category_id {segment.get('category_id')!r}, which no category has")
    if segment.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"has a segment with iscrowd {segment['iscrowd']!r}, which is neither 0 nor 1")
    return number, class_id, bool(segment.get("iscrowd"))


def is_file_name(value: Any) -> bool:
    """Whether a file can have this name: an empty or endless one would be an error of the operating system."""
    if not isinstance(value, str) or "\0" in value or len(value) > 1024:
        return False
    path = PurePosixPath(value)
    return path.name != "" and all(len(part.encode("utf-8", "surrogatepass")) < 256 for part in path.parts)


def whole_number(value: Any) -> int | None:
    """A whole number, which JSON may also write as 7.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def renumbered(
    ids: Int32[np.ndarray, "height width"], known: Int32[np.ndarray, " segments"]
) -> tuple[Int32[np.ndarray, "height width"], Int64[np.ndarray, " unknown"]]:
    """Replace ids of up to 24 bits by their position in a list plus one, so that tables over ids stay small.

    Returns:
        The new map, where `VOID_ID` stays, and the ids that are not known, which become void.
    """
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))  # of runs of one id: far fewer than pixels
    values = flat[starts]
    order = np.argsort(known)
    numbers = np.concatenate([order + 1, [VOID_ID]]).astype(np.int32)
    ranked = np.concatenate([known[order], [-1]])
    place = np.searchsorted(ranked[:-1], values)
    hit = ranked[place] == values
    unknown = np.unique(values[~hit & (values != VOID_ID)]).astype(np.int64)
    runs = np.where(hit, numbers[place], VOID_ID).astype(np.int32)
    return np.repeat(runs, np.diff(starts, append=flat.size)).reshape(ids.shape), unknown


Annotation = tuple[Path, tuple[Segment, ...], Mapping[int, float]]
"""PNG and segments of one image, and the segments' areas in pixels by id, as far as the JSON has them."""


class Pair(NamedTuple):
    """One image's ground truth and prediction, whose segments are renumbered 1, 2, ... in the order of its list.

    `stale_areas` counts `areas` of the JSON (by true segment's id) that are not the number of pixels; `has_unlisted`
    tells whether `gt_map` has ids that are neither void nor listed.
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
    """All images of a ground truth with their predictions; a sequence of `Pair`, read on access.

    A category that only the prediction uses is an error; a true segment of a category that is not listed counts as no
    segment, though its pixels are not void. The prediction's JSON needs no other list than "annotations". `notes` are
    messages about what was passed over.

    Raises:
        UserError: a file is missing or not of the format, or an image has no prediction.
    """

    def __init__(
        self, gt_json: Path, pred_json: Path, gt_folder: Path | None = None, pred_folder: Path | None = None
    ) -> None:
        truth = read_coco_json(gt_json, "give the ground truth's JSON first", ("annotations", "categories"))
        prediction = read_coco_json(pred_json, "give the prediction's JSON second", ("annotations",))
        self.gt_json, self.pred_json = gt_json, pred_json
        self.info = _any_categories(truth, gt_json)
        self._class_of = class_indices(self.info)
        gt_folder = _folder(gt_json, gt_folder, "--gt-folder")
        pred_folder = _folder(pred_json, pred_folder, "--pred-folder")
        true, predicted = _by_image(truth, gt_json), _by_image(prediction, pred_json)
        if not true:
            raise UserError(f"{gt_json} has no annotations: give the ground truth of at least one image")
        self._image_ids = list(true)
        if missing := [image_id for image_id in true if image_id not in predicted]:
            hint = "predict every image, if need be with an empty segments_info"
            if str(missing[0]) in map(str, predicted):
                hint = "write its image_id as the ground truth does (a number and a text are not equal)"
            more = f" (nor for {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{pred_json} has no prediction for image {missing[0]!r} of {gt_json}{more}: {hint}")
        self._truth = [self._annotation(i, true[i], gt_json, gt_folder, is_truth=True) for i in true]
        self._predictions = [self._annotation(i, predicted[i], pred_json, pred_folder, is_truth=False) for i in true]
        self.notes: list[str] = []
        if extra := len(predicted) - len(true):
            self.notes.append(f"{pred_json}: {extra} image(s) are not in the ground truth and do not count")
        known = sum(len(segments) for _, segments, _ in self._truth)
        if unknown := sum(len(entry["segments_info"]) for entry in true.values()) - known:
            self.notes.append(f"{gt_json}: {unknown} segment(s) have a category_id that no category has; not counted")

    def __len__(self) -> int:
        return len(self._truth)

    def __getitem__(self, index: int) -> Pair:
        """Raises `UserError` for a PNG that cannot be read, or does not fit the other PNG or its JSON."""
        image_id = self._image_ids[index]
        (gt_png, gt_segments, areas), (pred_png, predicted, _) = self._truth[index], self._predictions[index]
        gt_map, ids = _read_ids(gt_png), _read_ids(pred_png)
        if ids.shape != gt_map.shape:
            height, width = ids.shape
            raise UserError(
                f"{pred_png} is {width}x{height}, but {gt_png} is {gt_map.shape[1]}x{gt_map.shape[0]}: "
                "write predictions at the ground truth's size"
            )
        pred_map, unlisted = renumbered(ids, np.array([s.id for s in predicted], np.int32))
        pixels = np.bincount(pred_map.ravel(), minlength=len(predicted) + 1)[1:]
        if unlisted.size:
            raise UserError(
                f"{pred_png} has the id {unlisted[0]}, which its entry in {self.pred_json} does not list: "
                f"list every segment there, and give pixels without one the id {VOID_ID}"
            )
        if not pixels.all():
            raise UserError(
                f"{self.pred_json} lists the segment {predicted[int(pixels.argmin())].id} of image "
                f"{image_id!r}, which has no pixels in {pred_png}: list only segments with pixels"
            )
        pred_segments = tuple(s._replace(id=number) for number, s in enumerate(predicted, start=1))
        numbers, unlisted = renumbered(gt_map, np.array([s.id for s in gt_segments], np.int32))
        pixels = np.bincount(numbers.ravel(), minlength=len(gt_segments) + 1)[1:]
        stale = sum(areas.get(s.id, n) != n for s, n in zip(gt_segments, pixels.tolist(), strict=True))
        return Pair(image_id, pred_map, pred_segments, gt_map, gt_segments, areas, stale, bool(unlisted.size))

    def _annotation(self, image_id: ImageId, entry: Content, path: Path, folder: Path, *, is_truth: bool) -> Annotation:
        place = f"{path}: the annotation of image {image_id!r}"
        try:
            listed = _listed(entry, lowest=VOID_ID + 1 if is_truth else VOID_ID)
        except ValueError as error:
            raise UserError(f"{place} {error}: correct the JSON") from error
        segments, areas = [], {}
        for number, segment in listed.items():
            class_id = self._class_of.get(whole_number(segment.get("category_id")))
            if class_id is not None:
                is_thing = self.info.classes[class_id].is_thing
                segments.append(Segment(number, class_id, is_thing, segment.get("iscrowd") == 1))
            elif not is_truth:
                raise UserError(
                    f"{place} has the segment {number} with the category_id {segment.get('category_id')!r}, "
                    f"which no category of {self.gt_json} has: use the ground truth's category ids"
                )
            area = segment.get("area") if is_truth and class_id is not None else None
            if area is not None:
                if isinstance(area, bool) or not isinstance(area, int | float) or not 0 <= area < 2**53:
                    raise UserError(f"{place} has a segment with the area {area!r}: give its number of pixels")
                areas[number] = float(area)
        name = entry.get("file_name")
        if not is_file_name(name) or str(name).splitlines() != [name]:
            raise UserError(f"{place} has the file_name {name!r}: name its PNG")
        if not (png := folder / str(name)).is_file():
            option = "--gt-folder" if is_truth else "--pred-folder"
            raise UserError(f"{png} does not exist: put it there, or give another folder by {option}")
        return png, tuple(segments), areas


def _any_categories(content: Content, path: Path) -> DatasetInfo:
    """The classes as panopticapi takes them: names and colours do not matter, and there may be any number."""
    classes = []
    for index, category in enumerate(content["categories"]):
        number = whole_number(category.get("id"))
        if number is None or "isthing" not in category:
            raise UserError(f"{path}: category number {index} needs a whole number 'id' and 'isthing' 0 or 1: add them")
        name = str(category.get("name", number))
        classes.append(ClassInfo(name, distinct_color(index), category["isthing"] == 1, number))
    if not classes:
        raise UserError(f"{path} has no categories: list those of the data set")
    repeated, times = Counter(c.category_id for c in classes).most_common(1)[0]
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


def _read_ids(path: Path) -> Int32[np.ndarray, "height width"]:
    values = read_map(path, "write it anew")
    if values.ndim != 3 or values.shape[2] < 3:
        raise UserError(f"{path} has no colours: a segment's id is written as RGB, R + 256 G + 256² B")
    return rgb_to_id(values[..., :3])
