"""Files as COCO and the annotation tools write them; masks and precision against pycocotools on the same file."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pem_lightning.data.check import check_split
from pem_lightning.data.coco_instances import (
    BEYOND,
    COVERED,
    CROWDS,
    NO_PIXELS,
    OVERLAP,
    CocoInstancesDataModule,
    CocoInstancesDataset,
    _run_lengths,
)
from pem_lightning.data.targets import build_target
from pem_lightning.metrics import AveragePrecision
from pem_lightning.types import Segment, UserError
from tests.data.damage import outcome

CATEGORIES = [
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 7, "name": "train", "supercategory": "vehicle", "color": "#00ff00"},
]
HEIGHT, WIDTH = 20, 30


def rectangle(left, top, right, bottom):
    """A polygon around pixels."""
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number, segmentation, image_id=5, category_id=1, **more):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "iscrowd": 0,
        **more,
    }


def run_lengths(mask, compressed=True):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    if compressed:
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = np.asarray(mask, np.uint8).ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": encoded["size"], "counts": np.diff(starts, prepend=0).tolist()}


def ring():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:12, 2:12] = True
    mask[5:9, 5:9] = False
    return mask


def write(root, annotations, images=(5,), split="val", categories=CATEGORIES, size=(HEIGHT, WIDTH), scale=1):
    """Images by id, of a multiple of the size; returns the JSON's path."""
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir()
    listed = []
    for number in images:
        Image.new("RGB", (scale * WIDTH, scale * HEIGHT), (1, 2, 3)).save(root / f"{split}2017" / f"{number:012}.jpg")
        listed.append(
            {"id": number, "file_name": f"{number:012}.jpg", "height": scale * size[0], "width": scale * size[1]}
        )
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def opened(path, **arguments):
    return CocoInstancesDataset(path, path.parent.parent / "val2017", **arguments)


def masks_of(sample):
    return {s.id: (sample.panoptic == s.id).numpy() for s in sample.segments}


def test_classes_follow_the_file(tmp_path):
    """Ids with gaps, in no order; the background comes last with an id that is free."""
    write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])])
    info = CocoInstancesDataModule(tmp_path, "instance").info
    assert info.class_names == ("toothbrush", "person", "train")
    assert info.category_ids == (90, 1, 7)
    assert info.thing_classes == {0, 1, 2}
    for task in ("panoptic", "semantic"):
        info = CocoInstancesDataModule(tmp_path, task).info
        assert (info.class_names[3:], info.category_ids[3:], info.thing_classes) == (("background",), (0,), {0, 1, 2})


def test_roboflows_parent_category_is_no_class(tmp_path):
    categories = [
        {"id": 0, "name": "crack", "supercategory": "none"},
        {"id": 1, "name": "crack", "supercategory": "crack"},
    ]
    path = write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])], categories=categories)
    assert opened(path).info.category_ids == (1,)
    edit(path, lambda c: c["annotations"][0].update(category_id=0))
    with pytest.raises(UserError, match="category_id 0, which no category has"):
        opened(path)


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_are_pycocotools(tmp_path, compressed):
    """Several polygons (a part within another is no hole), run lengths with a hole, a crowd."""
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[15:, 20:] = True
    annotations = [
        annotation(11, [rectangle(13, 1, 19, 9), rectangle(14, 2, 16, 4), [20.5, 1.2, 25.1, 3.3, 22.7, 8.9]]),
        annotation(12, run_lengths(ring(), compressed), category_id=7),
        annotation(13, run_lengths(crowd, compressed), category_id=90, iscrowd=1),
    ]
    path = write(tmp_path, annotations)
    sample = opened(path)[0]
    assert sample.name == "000000000005"
    assert sample.segments == (Segment(1, 1, True), Segment(2, 2, True), Segment(3, 0, True, is_crowd=True))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    for mask, entry in zip(masks_of(sample).values(), annotations, strict=True):
        assert np.array_equal(mask, coco.annToMask(entry) > 0)
    assert build_target(sample, "instance").labels.tolist() == [1, 2]
    assert build_target(sample, "panoptic").labels.tolist() == [1, 2]
    with_background = opened(path, background=True)[0]
    assert with_background.segments == (*sample.segments, Segment(4, 3, False))
    assert ((sample.panoptic == 0) == (with_background.panoptic == 4)).all()
    assert with_background.class_map().unique().tolist() == [0, 1, 2, 3]
    assert build_target(with_background, "panoptic").labels.tolist() == [1, 2, 3]


def test_images_without_objects_stay(tmp_path):
    dataset = opened(write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])], images=(5, 6)), background=True)
    assert dataset.image_ids == {"000000000005": 5, "000000000006": 6}
    assert dataset[1].segments == (Segment(1, 3, False),)
    assert (dataset[1].panoptic == 1).all()
    dataset = opened(tmp_path / "annotations" / "instances_val2017.json")
    assert dataset[1].segments == ()
    assert build_target(dataset[1], "instance").masks.shape == (0, HEIGHT, WIDTH)


def test_the_smaller_is_on_top(tmp_path):
    """Whatever the order; crowds lie below all. What is hidden completely is left out."""
    annotations = [
        annotation(1, [rectangle(4, 4, 8, 8)]),
        annotation(2, [rectangle(2, 2, 12, 12)], category_id=7),
        annotation(3, [rectangle(6, 6, 9, 9)], category_id=90, iscrowd=1),
        annotation(4, [rectangle(20, 2, 24, 12)]),
        annotation(5, [rectangle(20, 2, 22, 12)]),
        annotation(6, [rectangle(22, 2, 24, 12)]),
    ]
    path = write(tmp_path, annotations, images=(5, 6))
    dataset = opened(path)
    sample = dataset[0]
    assert [s.class_id for s in sample.segments] == [1, 2, 1, 1]
    assert [int(mask.sum()) for mask in masks_of(sample).values()] == [16, 84, 20, 20]
    assert dataset.remarks(0) == [OVERLAP, COVERED, CROWDS]
    result = check_split(opened(path, on_error="collect"), "val")
    assert [
        note for note in result.notes if note.endswith((f"1 image(s) have {OVERLAP}", f"1 image(s) have {COVERED}"))
    ]
    assert result.problems == []


@pytest.mark.parametrize(
    ("segmentation", "remark"),
    [
        ([[1, 1, 5, 5]], NO_PIXELS),  # pycocotools takes four numbers for a box
        ([[1, 1]], NO_PIXELS),
        ([[3, 3, 3, 3, 3, 3]], NO_PIXELS),
        ([rectangle(100, 100, 120, 110)], NO_PIXELS),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, NO_PIXELS),
        ([rectangle(25, 10, 50, 40)], BEYOND),
        ([rectangle(-5, -5, 5, 5)], BEYOND),
    ],
)
def test_what_has_no_pixels_is_left_out_and_said(tmp_path, segmentation, remark):
    good = annotation(1, [rectangle(10, 10, 15, 15)])
    path = write(tmp_path, [good, annotation(2, segmentation)])
    dataset = opened(path)
    assert len(dataset[0].segments) == (1 if remark == NO_PIXELS else 2)
    assert remark in dataset.remarks(0)
    assert any(note.endswith(remark) for note in check_split(opened(path, on_error="collect"), "val").notes)


def test_a_box_beyond_the_image(tmp_path):
    path = write(tmp_path, [annotation(1, [rectangle(10, 10, 15, 15)], bbox=[25, 10, 20, 5])])
    assert opened(path).remarks(0) == [BEYOND]
    edit(path, lambda c: c["annotations"][0].update(bbox=[25, 10, 5.5, 5]))
    assert opened(path).remarks(0) == []


def first(**more):
    return lambda c: c["annotations"][0].update(more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(segmentation=[]), r"annotation 1 with no segmentation \(a box alone is no mask: draw its outline"),
        (first(segmentation=None), r"annotation 1 with no segmentation"),
        (lambda c: c["annotations"][0].pop("segmentation"), r"annotation 1 with no segmentation"),
        (first(segmentation=rectangle(1, 1, 5, 5)), r"no list of polygons \[\["),
        (first(segmentation=[[1, 1, 5, 5, 1]]), r"no list of polygons"),
        (first(segmentation=[[1, 1, 5, 5, 1, float("nan")]]), r"no list of polygons"),
        (first(segmentation=[[1, 1, 5, 5, 1, 1e9]]), r"no list of polygons"),
        (first(segmentation="ring"), r"run lengths of the size None"),
        (first(segmentation={"size": [30, 20], "counts": [600]}), r"run lengths of the size \[30, 20\], while"),
        (first(segmentation={"size": [20, 30], "counts": [10, 20]}), r"of 30 pixels, while the image has 600"),
        (first(segmentation={"size": [20, 30], "counts": [700, -100]}), r"neither whole numbers nor"),
        (first(segmentation={"size": [20, 30], "counts": "o"}), r"neither whole numbers nor"),
        (first(category_id=2), r"category_id 2, which no category has"),
        (first(iscrowd=2), r"iscrowd 2, which is neither"),
        (lambda c: c["images"][0].pop("width"), r"000000000005.jpg has the width None and height 20"),
        (
            lambda c: c["annotations"].append(annotation(9, [rectangle(1, 1, 5, 5)], image_id=77)),
            r"image_id 77, which no",
        ),
        (lambda c: c["images"][0].update(file_name="x.jpg"), r"x\.jpg does not exist"),
        (lambda c: c["images"][0].update(file_name="x\ny.jpg"), r"x y\.jpg does not exist"),
    ],
)
def test_wrong_entries_are_named_and_can_be_left_out(tmp_path, caplog, change, message):
    annotations = [annotation(n, [rectangle(1, 1, 5, 5)], image_id=n + 4) for n in (1, 2)]
    path = write(tmp_path, annotations, images=(5, 6))
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    (problem,) = check_split(opened(path, on_error="collect"), "val").problems
    assert problem == str(caught.value)
    dataset = opened(path, on_error="skip")
    assert "000000000006" in dataset.names
    assert f"left out: {problem}" in caplog.messages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(id=1), "has the annotation id 1 2 times"),
        (lambda c: c["images"][1].update(id=5), "has the image id 5 2 times"),
        (lambda c: c["images"][1].update(file_name="000000000005.jpg"), "several images named 000000000005"),
        (lambda c: c.pop("categories"), "has no list 'categories': give a COCO instance JSON"),
        (lambda c: c["categories"][0].update(id=1), "has the class id 1 twice"),
        (lambda c: c.update(annotations=[]), "annotates no object"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "all 2 objects are crowds .* set iscrowd to 0"),
        (first(segments_info=[]), "choose dataset=coco_panoptic"),
    ],
)
def test_files_that_are_no_instance_json(tmp_path, change, message):
    annotations = [annotation(n, [rectangle(1, 1, 5, 5)], image_id=n + 4) for n in (1, 2)]
    path = write(tmp_path, annotations, images=(5, 6))
    edit(path, change)
    for on_error in ("stop", "skip", "collect"):
        with pytest.raises(UserError, match=message) as caught:
            opened(path, on_error=on_error)
        assert "\n" not in str(caught.value)


def test_a_category_named_background(tmp_path):
    path = write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])], categories=[{"id": 1, "name": "background"}])
    assert opened(path).info.class_names == ("background",)
    with pytest.raises(UserError, match="has a category 'background', which all tasks but instance add themselves"):
        opened(path, background=True)


@pytest.mark.parametrize(("size", "turned"), [((40, 60), False), ((WIDTH, HEIGHT), True)])
def test_sizes_that_differ_from_the_json(tmp_path, size, turned):
    path = write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])], size=size)
    with pytest.raises(UserError, match=f"is 30x20, but .* says {size[1]}x{size[0]}: give the image") as caught:
        opened(path)[0]
    assert ("EXIF" in str(caught.value)) == turned
    assert check_split(opened(path, on_error="collect"), "val").problems[0] == str(caught.value)


def test_both_splits_need_the_same_categories(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, [annotation(1, [rectangle(1, 1, 5, 5)])], split=split)
    datamodule = CocoInstancesDataModule(tmp_path, "instance", batch_size=1)
    assert len(datamodule.make_dataset("train", None)) == 1
    edit(tmp_path / "annotations" / "instances_train2017.json", lambda c: c["categories"].reverse())
    with pytest.raises(UserError, match="other categories than the rest of coco_instances, from number 0 on"):
        datamodule.make_dataset("train", None)


@given(st.lists(st.booleans(), min_size=12, max_size=400))
@settings(max_examples=60, deadline=None)
def test_compressed_run_lengths_are_read_as_pycocotools_does(values):
    mask = np.resize(np.array(values), (12, len(values) // 12 * 7)).astype(bool)
    compressed, plain = run_lengths(mask), run_lengths(mask, compressed=False)
    assert _run_lengths(compressed, mask.shape) == _run_lengths(plain, mask.shape) == plain["counts"]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([[HEIGHT, WIDTH], [HEIGHT * WIDTH], rectangle(1, 1, 5, 5)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["size", "counts", "id", "bbox"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write(tmp_path_factory.mktemp("junk"), [annotation(1, [rectangle(1, 1, 5, 5)])])


@given(
    key=st.sampled_from(["id", "image_id", "category_id", "iscrowd", "segmentation", "bbox"]),
    of=st.sampled_from(["annotations", "images", "categories"]),
    junk=JUNK,
)
@settings(max_examples=150, deadline=None)
def test_any_json_gives_a_sample_or_one_line(shared, key, of, junk):
    if of != "annotations":
        key = {"image_id": "file_name", "category_id": "width", "iscrowd": "name", "bbox": "supercategory"}.get(
            key, key
        )
    content = json.loads(shared.read_text())
    content[of][0][key] = junk
    path = shared.with_name("junk.json")
    path.write_text(json.dumps(content))
    outcome(lambda: [(dataset.remarks(0), dataset.read(0)) for dataset in [opened(path, background=True)]])


def test_precision_is_pycocotools_on_the_original_file(tmp_path):
    """A toy's predictions: our evaluation of the samples, and COCO's evaluator on the JSON itself, with crowds."""
    rng = np.random.default_rng(0)
    scale, images = 20, range(1, 13)
    annotations, detections = [], []
    predicted = {image_id: [] for image_id in images}
    places = [(image_id, 100 * column) for image_id in images for column in range(6) if rng.random() < 0.7]
    for number, (image_id, left) in enumerate(places, start=1):  # side by side: nothing overlaps
        top, width, height = (int(rng.integers(*limits)) for limits in ((0, 160), (15, 100), (30, 240)))
        mask = np.zeros((scale * HEIGHT, scale * WIDTH), bool)
        mask[top : top + height, left : left + width] = True
        category, is_crowd = int(rng.choice([90, 1, 7])), int(rng.random() < 0.15)
        shape = [rectangle(left, top, left + width, top + height)]
        shape = shape if number % 3 else run_lengths(mask, compressed=number % 2 == 0)
        entry = annotation(number, shape, image_id, category, iscrowd=is_crowd, area=int(mask.sum()))
        annotations.append({**entry, "bbox": [left, top, width, height]})
        for _ in range(int(rng.integers(0, 3))):
            moved = np.roll(mask, rng.integers(-8, 9, 2), (0, 1))
            found, score = (category if rng.random() < 0.8 else 1), float(rng.random())
            predicted[image_id].append((torch.from_numpy(moved), found, score))
            facts = {"image_id": image_id, "category_id": found, "score": score}
            detections.append({**facts, "segmentation": run_lengths(moved)})
    assert any(a["iscrowd"] for a in annotations)
    path = write(tmp_path, annotations, images=images, scale=scale)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        official = COCOeval(truth, truth.loadRes(detections), "segm")
        official.evaluate()
        official.accumulate()
        official.summarize()
    dataset = opened(path)
    metric = AveragePrecision(3)
    indices = {category_id: index for index, category_id in enumerate(dataset.info.category_ids)}
    for index, image_id in enumerate(images):
        sample = dataset[index]
        instances = [(mask, indices[category_id], score) for mask, category_id, score in predicted[image_id]]
        metric.update(instances, sample.panoptic, sample.segments, sample.name)
    result = metric.compute().all
    expected = official.stats[:6].tolist()
    assert 0.05 < result.ap < 0.95
    assert list(result) == pytest.approx(expected, abs=1e-12)
