"""Any data set in the COCO panoptic format: a JSON, a folder of PNGs whose colours are segment ids, and the images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    checked_info,
    class_info,
    distinct_color,
    make_sample,
    read_map,
    read_pair,
)
from pem_lightning.data.targets import Task
from pem_lightning.data.transforms import resized_to_crops, square_crops
from pem_lightning.files import MAX_ID, rgb_to_id
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Sample, Segment, UserError

_FILES_HINT = "check dataset.root, and the keys dataset.train_* and dataset.val_*"


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
        cure: str = _FILES_HINT,
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
        content = read_panoptic_json(self.root / val_json, _FILES_HINT)
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


_JSON_HINT = "give a COCO panoptic JSON, see cocodataset.org/#format-data"

Content = Mapping[str, Any]


def read_panoptic_json(
    path: Path, cure: str, lists: Sequence[str] = ("images", "annotations", "categories")
) -> Content:
    """Read a file and check that it has the format's lists.

    Args:
        path: of the JSON.
        cure: what the user can do if there is none.
        lists: those that it must have; a file of predictions often has no others than "annotations".

    Raises:
        UserError: it is missing, no JSON, or of another format.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {cure}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}): {_JSON_HINT}") from error
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: {_JSON_HINT}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path} has entries in {key!r} that are no objects: {_JSON_HINT}")
    return content


def classes_of(content: Content, path: Path, name: str) -> DatasetInfo:
    """The classes, in the order of the file's categories.

    Raises:
        UserError: a category lacks its id, its name or `isthing`, or an id or a name occurs twice.
    """
    classes = []
    for index, category in enumerate(content["categories"]):
        if category.get("isthing") not in (0, 1):
            raise UserError(f"{path}: category {category.get('name')!r} does not say isthing 0 or 1: {_JSON_HINT}")
        is_thing = bool(category["isthing"])
        classes.append(
            class_info(index, category.get("name"), category.get("color"), is_thing, category.get("id"), path)
        )
    return checked_info(name, classes, path)


def check_same_classes(found: DatasetInfo, expected: DatasetInfo, path: Path) -> None:
    """Refuse a file whose categories are not those of the data set.

    Raises:
        UserError: they differ in order, ids, names or kinds.
    """
    ours = [(c.category_id, c.name, c.is_thing) for c in expected.classes]
    theirs = [(c.category_id, c.name, c.is_thing) for c in found.classes]
    if ours != theirs:
        index = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"{path} has other categories than the rest of {expected.name}, from number {index} on: "
            "all files of a data set need the same, in the same order"
        )


class PanopticIndex:
    """Which files belong together and what their segments are.

    Millions of segments as Python objects would be copied into every loading process bit by bit, as soon as they are
    looked at; three flat arrays are shared.

    Attributes:
        names: unique, the images' file names without suffix, folders joined by an underscore.
        images: file names of the images.
        maps: file names of the PNGs.
        problems: entries that were left out, one message each.

    Args:
        content: of the JSON.
        path: named in problems.
        info: the classes.

    Raises:
        UserError: the format is violated where nothing can be left out.
    """

    def __init__(self, content: Content, path: Path, info: DatasetInfo) -> None:
        self.names: list[str] = []
        self.images: list[str] = []
        self.maps: list[str] = []
        self.problems: list[str] = []
        self._class_of = {category_id: index for index, category_id in enumerate(info.category_ids)}
        counts, rows = [0], []
        for image, annotation in self._pairs(content, path):
            segments: Any = annotation.get("segments_info")
            map_name = annotation.get("file_name") or str(PurePosixPath(image).with_suffix(".png"))
            fault = self._fault(segments) if is_file_name(map_name) else f"has the file_name {map_name!r}"
            if fault:
                self.problems.append(f"{path}: annotation of {image} {fault}: correct the JSON")
                continue
            self.names.append(_name_of(image))
            self.images.append(image)
            self.maps.append(map_name)
            rows += [(s["id"], self._class_of[s["category_id"]], bool(s.get("iscrowd"))) for s in segments]
            counts.append(len(segments))
        self._starts = np.cumsum(counts)
        columns = np.array(rows, np.int32).reshape(-1, 3)
        self._ids = np.ascontiguousarray(columns[:, 0])
        self._classes = columns[:, 1].astype(np.uint8)
        self._crowd = columns[:, 2].astype(bool)
        if len(set(self.names)) < len(self.names):
            repeated, _ = Counter(self.names).most_common(1)[0]
            raise UserError(f"{path} has several images named {repeated}: remove or rename all but one")

    def segments(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " segments"], UInt8[np.ndarray, " segments"], Bool[np.ndarray, " segments"]]:
        """Ids, class indices and crowd flags of one image's segments, in the file's order."""
        part = slice(self._starts[index], self._starts[index + 1])
        return self._ids[part], self._classes[part], self._crowd[part]

    def _pairs(self, content: Content, path: Path) -> Iterator[tuple[str, Content]]:
        """Image file names with their annotations, in the order of the images."""
        annotations = {str(a.get("image_id")): a for a in content["annotations"]}
        if len(annotations) < len(content["annotations"]):
            raise UserError(f"{path} annotates an image twice: remove one of the annotations")
        for image in content["images"]:
            if not is_file_name(image.get("file_name")):
                raise UserError(
                    f"{path} has an image without file_name, or with one that no file can have: {_JSON_HINT}"
                )
            annotation = annotations.pop(str(image.get("id")), None)
            if annotation is None:
                self.problems.append(f"{path}: {image['file_name']} has no annotation: annotate it or remove the entry")
            else:
                yield image["file_name"], annotation
        for image_id in annotations:
            self.problems.append(f"{path}: the annotation of image_id {image_id} has no image: correct the JSON")

    def _fault(self, segments: Any) -> str | None:
        """What is wrong with the segments of one image."""
        if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
            return "has no list segments_info"
        seen = set()
        for segment in segments:
            number, category = segment.get("id"), segment.get("category_id")
            if not isinstance(number, int) or not VOID_ID < number <= MAX_ID:
                return f"has the segment id {number!r}, which is not from 1 to {MAX_ID}"
            if number in seen:
                return f"has the segment id {number} twice"
            if not isinstance(category, int) or category not in self._class_of:
                return f"has the category_id {category!r}, which no category has"
            if segment.get("iscrowd", 0) not in (0, 1):
                return f"has a segment with iscrowd {segment['iscrowd']!r}, which is neither 0 nor 1"
            seen.add(number)
        return None


def is_file_name(value: Any) -> bool:
    """Whether a file can have this name: an empty or endless one would be an error of the operating system."""
    if not isinstance(value, str) or "\0" in value or len(value) > 1024:
        return False
    parts = PurePosixPath(value).parts
    return PurePosixPath(value).name != "" and all(len(p.encode("utf-8", "surrogatepass")) < 256 for p in parts)


def _name_of(image: str) -> str:
    return "_".join(PurePosixPath(image).with_suffix("").parts)


def renumbered(
    ids: Int32[np.ndarray, "height width"], known: Int32[np.ndarray, " segments"]
) -> tuple[Int32[np.ndarray, "height width"], Int64[np.ndarray, " unknown"]]:
    """Replace ids of up to 24 bits by their position in a list plus one, so that tables over ids stay small.

    Args:
        ids: of every pixel; `VOID_ID` stays.
        known: the ids that may occur.

    Returns:
        The new map, and the ids that are not known, which are void in it.
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


# Two COCO panoptic files, ground truth and prediction, brought together as panopticapi does for its evaluation.
#
# Training data is checked more strictly (`coco_json.PanopticIndex`). Here a file is refused only if panopticapi refuses
# it, too, or if its answer would depend on chance; what panopticapi passes over in silence becomes a note.


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
        self._index = {category_id: index for index, category_id in enumerate(self.info.category_ids)}
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
