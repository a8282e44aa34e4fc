from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.coco import CocoPanopticDataModule, CocoPanopticDataset, renumbered
from pem_lightning.data.dataset import distinct_color
from pem_lightning.data.targets import class_map, panoptic_target
from pem_lightning.files import MAX_ID, id_to_rgb
from pem_lightning.types import Segment, UserError

CATEGORIES = [
    {"id": 200, "name": "rug", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60], "supercategory": "person"},
    {"id": 90, "name": "toothbrush", "isthing": 1},
]


def segment(number, category, **more):
    return {"id": number, "category_id": category, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1], **more}


def write(root, images, categories=CATEGORIES, split="val"):
    """Images by name as (id map, segments_info), in the layout that the data module expects."""
    name = f"panoptic_{split}2017"
    maps, photos = root / "annotations" / name, root / f"{split}2017"
    maps.mkdir(parents=True, exist_ok=True)
    photos.mkdir(exist_ok=True)
    content = {"images": [], "annotations": [], "categories": categories}
    for number, (stem, (ids, segments)) in enumerate(images.items()):
        ids = np.asarray(ids, np.int32)
        Image.fromarray(id_to_rgb(ids)).save(maps / f"{stem}.png")
        Image.new("RGB", ids.shape[::-1], (1, 2, 3)).save(photos / f"{stem}.jpg")
        content["images"].append({"id": number, "file_name": f"{stem}.jpg", "height": 1, "width": 1})
        content["annotations"].append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
    path = root / "annotations" / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def opened(root, split="val", **arguments):
    return CocoPanopticDataset(root / "annotations" / f"panoptic_{split}2017.json", root / f"{split}2017", **arguments)


ONE = {"a": ([[7, 7], [0, 9]], [segment(9, 1), segment(7, 200)])}


def test_classes_follow_the_file(tmp_path):
    write(tmp_path, ONE)
    info = CocoPanopticDataModule(tmp_path).info
    assert info.num_classes == 3
    assert info.class_names == ("rug", "person", "toothbrush")
    assert info.category_ids == (200, 1, 90)
    assert info.thing_classes == {1, 2}
    assert info.colors.tolist() == [list(distinct_color(0)), [220, 20, 60], list(distinct_color(2))]


def test_generated_colors_differ():
    colors = np.array([distinct_color(index) for index in range(133)])
    distances = np.abs(colors[:, None] - colors).sum(-1) + 999 * np.eye(133, dtype=int)
    assert distances.min() >= 5


def test_segments_are_numbered_as_listed(tmp_path):
    """Large ids, a crowd, a class map by the categories, a segment without pixels, and areas that lie."""
    ids = [[MAX_ID, MAX_ID, 0], [70_000, 256, 5]]
    segments = [segment(MAX_ID, 1), segment(5, 90, iscrowd=1), segment(70_000, 200), segment(256, 90), segment(44, 1)]
    write(tmp_path, {"a": (ids, segments)})
    sample = opened(tmp_path)[0]
    assert sample.name == "a"
    assert sample.panoptic.dtype == torch.int32
    assert sample.panoptic.tolist() == [[1, 1, 0], [3, 4, 2]]
    assert sample.segments == (
        Segment(1, 1, True),
        Segment(2, 2, True, is_crowd=True),
        Segment(3, 0, False),
        Segment(4, 2, True),
        Segment(5, 1, True),
    )
    assert class_map(sample).tolist() == [[1, 1, 255], [0, 2, 2]]
    assert panoptic_target(sample).labels.tolist() == [1, 0, 2, 1]
    assert panoptic_target(sample).masks.sum((1, 2)).tolist() == [2, 1, 1, 0]


def test_odd_sizes_empty_and_single_class_images(tmp_path):
    write(
        tmp_path,
        {"empty": (np.zeros((3, 5)), []), "single": (np.full((1, 1), 9), [segment(9, 200)]), "listed": ([[0]], [])},
    )
    empty, single, listed = opened(tmp_path)
    assert (empty.segments, empty.panoptic.tolist()) == ((), [[0] * 5] * 3)
    assert (single.segments, single.panoptic.tolist()) == ((Segment(1, 0, False),), [[1]])
    assert listed.segments == ()


def test_65535_instances(tmp_path):
    """As many as pixels: no table or loop may grow with ids times pixels."""
    ids = np.random.default_rng(0).permutation(np.arange(1, 65_536))
    values = np.append(ids, 0).reshape(256, 256)
    write(tmp_path, {"a": (values, [segment(int(i), 90) for i in ids])})
    sample = opened(tmp_path)[0]
    assert len(sample.segments) == 65_535
    assert sample.panoptic.flatten().tolist() == [*range(1, 65_536), 0]


@given(st.lists(st.sampled_from([0, 1, 2, 255, 256, 65_536, MAX_ID]), min_size=1, max_size=30), st.randoms())
@settings(max_examples=60, deadline=None)
def test_renumbering_pixel_by_pixel(values, random):
    known = [1, 256, 65_536, MAX_ID]
    random.shuffle(known)
    ids, unknown = renumbered(np.array([values], np.int32), np.array(known, np.int32))
    assert ids[0].tolist() == [known.index(v) + 1 if v in known else 0 for v in values]
    assert unknown.tolist() == sorted({2, 255} & set(values))


def test_renumbering_without_segments():
    ids, unknown = renumbered(np.array([[0, 3]], np.int32), np.empty(0, np.int32))
    assert (ids.tolist(), unknown.tolist()) == ([[0, 0]], [3])


def test_file_names_come_from_the_file(tmp_path):
    path = write(tmp_path, ONE)
    (tmp_path / "val2017" / "sub").mkdir()
    (tmp_path / "val2017" / "a.jpg").rename(tmp_path / "val2017" / "sub" / "a.jpg")
    (tmp_path / "annotations" / "panoptic_val2017" / "a.png").rename(tmp_path / "elsewhere.png")
    edit(path, lambda c: c["images"][0].update(file_name="sub/a.jpg"))
    edit(path, lambda c: c["annotations"][0].update(file_name="elsewhere.png"))
    dataset = opened(tmp_path, maps=tmp_path)
    assert dataset.names == ["sub_a"]
    assert [p.relative_to(tmp_path).as_posix() for p in dataset.files(0)] == ["val2017/sub/a.jpg", "elsewhere.png"]
    assert dataset[0].panoptic.tolist() == [[2, 2], [0, 1]]


def test_an_id_that_is_not_listed_is_named(tmp_path):
    path = write(tmp_path, ONE)
    edit(path, lambda c: c["annotations"][0]["segments_info"].pop())
    with pytest.raises(UserError, match=r"a\.png has the segment id 7, which its entry in the JSON does not list"):
        opened(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0]["segments_info"].append(segment(9, 200)), r"a\.jpg has the segment id 9 twice"),
        (lambda c: c["annotations"][0]["segments_info"].append(segment(0, 1)), r"segment id 0, .* from 1 to 16777215"),
        (lambda c: c["annotations"][0]["segments_info"].append(segment(2**24, 1)), r"segment id 16777216"),
        (lambda c: c["annotations"][0]["segments_info"].append(segment(3, 2)), r"category_id 2, which no category has"),
        (lambda c: c["annotations"][0]["segments_info"].append(segment(3, None)), r"category_id None"),
        (lambda c: c["annotations"][0].pop("segments_info"), r"a\.jpg has no list segments_info"),
        (lambda c: c["annotations"].pop(0), r"a\.jpg has no annotation"),
        (lambda c: c["annotations"][0].update(file_name="x.png"), r"x\.png does not exist"),
        (lambda c: c["images"].pop(0), r"annotation of image_id 0 has no image"),
    ],
)
def test_wrong_entries_are_named_and_can_be_left_out(tmp_path, change, message):
    path = write(tmp_path, {**ONE, "b": ONE["a"]})
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    assert opened(tmp_path, on_error="skip").names == ["b"]
    collected = opened(tmp_path, on_error="collect")
    assert len(collected.problems) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c.update(annotations={}), "no list 'annotations'"),
        (lambda c: c["annotations"].append(3), "entries in 'annotations' that are no objects"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotates an image twice"),
        (lambda c: c["images"][0].pop("file_name"), "an image without file_name"),
        (lambda c: c.update(categories=[]), "0 classes: there must be 1 to 255"),
        (lambda c: c["categories"][0].pop("isthing"), "category 'rug' does not say isthing 0 or 1"),
        (lambda c: c["categories"][0].pop("name"), "class 0 has no name"),
        (lambda c: c["categories"][0].update(id=1), "class id 1 twice"),
        (lambda c: c["categories"][0].update(id="x"), "class 'rug' has the id 'x'"),
        (lambda c: c["categories"][0].update(name="person"), "class name person twice"),
        (lambda c: c["categories"][0].update(color=[1, 2]), r"class 'rug' has the color \[1, 2\]"),
        (lambda c: c.update(categories=[{"id": i, "name": f"{i}", "isthing": 0} for i in range(256)]), "256 classes"),
    ],
)
def test_what_is_not_the_format_is_named(tmp_path, change, message):
    path = write(tmp_path, ONE)
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, on_error="skip")
    assert path.name in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_garbage_instead_of_json(tmp_path, content):
    path = write(tmp_path, ONE)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"panoptic_val2017\.json") as caught:
        CocoPanopticDataModule(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("picture", [Image.new("RGB", (3, 2)), Image.new("L", (2, 2)), Image.new("RGBA", (2, 2))])
def test_maps_of_other_size_or_mode_are_named(tmp_path, picture):
    write(tmp_path, ONE)
    picture.save(tmp_path / "annotations" / "panoptic_val2017" / "a.png")
    with pytest.raises(UserError, match=r"a\.png is a .* map of . channel\(s\), its image a\.jpg needs a 2x2 map of 3"):
        opened(tmp_path)[0]


def test_splits_must_have_the_same_classes(tmp_path):
    write(tmp_path, ONE)
    write(tmp_path, ONE, CATEGORIES[::-1], "train")
    data = CocoPanopticDataModule(tmp_path, batch_size=1)
    assert len(data.make_dataset("val", None)) == 1
    with pytest.raises(UserError, match=r"panoptic_train2017\.json has other categories .* from number 0 on"):
        data.make_dataset("train", None)


def test_missing_files_say_which_keys(tmp_path):
    with pytest.raises(UserError, match=r"panoptic_val2017\.json does not exist: check dataset\.root"):
        CocoPanopticDataModule(tmp_path)
    write(tmp_path, ONE)
    data = CocoPanopticDataModule(tmp_path, val_images="nowhere")
    with pytest.raises(UserError, match=r"nowhere does not exist: check dataset\.root"):
        data.make_dataset("val", None)


def test_two_real_photographs(reference):
    """Two images of COCO with 50 segments; every segment has the area that COCO's JSON gives."""
    folder = reference / "panoptic_quality" / "coco_sample"
    data = CocoPanopticDataModule(
        folder, val_json="panoptic.json", val_maps="panoptic", val_images="images", num_workers=0
    )
    assert data.info.num_classes == 133
    assert len(data.info.thing_classes) == 80
    data.setup("validate")
    samples = [sample for batch in data.val_dataloader() for sample in batch.samples]
    assert [sample.name for sample in samples] == ["000000142238", "000000439180"]
    assert sum(len(sample.segments) for sample in samples) == 50
    listed = {
        a["image_id"]: a["segments_info"] for a in json.loads((folder / "panoptic.json").read_text())["annotations"]
    }
    for sample in samples:
        segments = listed[int(sample.name)]
        areas = torch.bincount(sample.panoptic.flatten(), minlength=len(segments) + 1)[1:]
        assert areas.tolist() == [s["area"] for s in segments]
        assert [s.is_crowd for s in sample.segments] == [bool(s["iscrowd"]) for s in segments]
        assert [data.info.category_ids[s.class_id] for s in sample.segments] == [s["category_id"] for s in segments]
