from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.coco import CocoPanopticDataModule, CocoPanopticDataset, PanopticPairs, renumbered
from pem_lightning.data.dataset import distinct_color
from pem_lightning.data.targets import build_target
from pem_lightning.files import MAX_ID, id_to_rgb
from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import Segment, UserError
from tests.data.damage import IDS, PHOTO, damages, encoded, outcome
from tests.panoptic_files import CATEGORIES, segment, write_panoptic

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["", ".", "..", "/", "a/../..", "\0", "\n", "x" * 300, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
"""Any JSON."""


def write(root, images, categories=CATEGORIES, split="val"):
    """Images by name as (id map, segments_info), in the layout that the data module expects."""
    path = root / "annotations" / f"panoptic_{split}2017.json"
    (root / f"{split}2017").mkdir()
    for stem, (ids, _) in images.items():
        Image.new("RGB", np.shape(ids)[::-1], (1, 2, 3)).save(root / f"{split}2017" / f"{stem}.jpg")
    listed = [{"id": stem, "file_name": f"{stem}.jpg", "height": 1, "width": 1} for stem in images]
    write_panoptic(path, images, categories=categories)
    edit(path, lambda content: content.update(images=listed))
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
    assert info.class_names == ("rug", "person", "toothbrush")
    assert info.category_ids == (200, 1, 90)
    assert info.thing_classes == {1, 2}
    assert info.colors.tolist() == [list(distinct_color(index)) for index in range(3)]


def test_segments_are_numbered_as_listed(tmp_path):
    """Large ids, a crowd, a class map by the categories, a segment without pixels, and areas that lie."""
    ids = [[MAX_ID, MAX_ID, 0], [70_000, 256, 5]]
    segments = [
        segment(MAX_ID, 1, area=9, bbox=[0, 0, 1, 1]),
        segment(5, 90, iscrowd=1),
        segment(70_000, 200),
        segment(256, 90),
        segment(44, 1),
    ]
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
    assert sample.class_map().tolist() == [[1, 1, 255], [0, 2, 2]]
    assert build_target(sample, "panoptic").labels.tolist() == [1, 0, 2, 1]
    assert build_target(sample, "panoptic").masks.sum((1, 2)).tolist() == [2, 1, 1, 0]


def test_odd_sizes_empty_and_single_class_images(tmp_path):
    images = {"empty": (np.zeros((3, 5)), []), "single": ([[9]], [segment(9, 200)]), "listed": ([[0]], [])}
    write(tmp_path, images)
    empty, single, listed = opened(tmp_path)
    assert (empty.segments, empty.panoptic.tolist()) == ((), [[0] * 5] * 3)
    assert (single.segments, single.panoptic.tolist()) == ((Segment(1, 0, False),), [[1]])
    assert listed.segments == ()


@given(st.lists(st.sampled_from([0, 1, 2, 255, 256, 65_536, MAX_ID]), min_size=1, max_size=30), st.randoms())
@settings(max_examples=40, deadline=None)
def test_renumbering_pixel_by_pixel(values, random):
    known = [1, 256, 65_536, MAX_ID]
    random.shuffle(known)
    ids, unknown = renumbered(np.array([values], np.int32), np.array(known, np.int32))
    assert ids[0].tolist() == [known.index(v) + 1 if v in known else 0 for v in values]
    assert unknown.tolist() == sorted({2, 255} & set(values))
    ids, unknown = renumbered(np.array([[0, 3]], np.int32), np.empty(0, np.int32))
    assert (ids.tolist(), unknown.tolist()) == ([[0, 0]], [3])


def test_file_names_come_from_the_file(tmp_path):
    path = write(tmp_path, ONE)
    (tmp_path / "val2017" / "sub").mkdir()
    (tmp_path / "val2017" / "a.jpg").rename(tmp_path / "val2017" / "sub" / "a.jpg")
    (tmp_path / "annotations" / "panoptic_val2017" / "a.png").rename(tmp_path / "elsewhere.png")
    edit(path, lambda c: c["images"][0].update(file_name="sub/a.jpg", id=4))
    edit(path, lambda c: c["annotations"][0].update(file_name="elsewhere.png", image_id=4))
    dataset = opened(tmp_path, maps=tmp_path)
    assert (dataset.names, dataset.image_ids) == (["sub_a"], {"sub_a": 4})
    assert [p.relative_to(tmp_path).as_posix() for p in dataset.files(0)] == ["val2017/sub/a.jpg", "elsewhere.png"]
    assert dataset[0].panoptic.tolist() == [[2, 2], [0, 1]]


def adds(number, category, **more):
    """Lists another segment for the first image."""
    return lambda c: c["annotations"][0]["segments_info"].append(segment(number, category, **more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adds(9, 200), r"a\.jpg has the segment id 9 twice"),
        (adds(0, 1), r"segment id 0, .* from 1 to 16777215"),
        (adds(2**24, 1), r"segment id 16777216"),
        (adds(3, 2), r"category_id 2, which no category has"),
        (adds(3, None), r"category_id None"),
        (adds(3, 1, iscrowd=2), r"iscrowd 2, which is neither"),
        (lambda c: c["annotations"][0].pop("segments_info"), r"a\.jpg has no list segments_info"),
        (lambda c: c["annotations"].pop(0), r"a\.jpg has no annotation"),
        (lambda c: c["annotations"][0].update(file_name="x.png"), r"x\.png does not exist"),
        (lambda c: c["annotations"][0].update(file_name="x\ny.png"), r"x y\.png does not exist"),
        (lambda c: c["images"].pop(0), r"annotation of image_id a has no image"),
    ],
)
def test_wrong_entries_are_named_and_can_be_left_out(tmp_path, change, message):
    path = write(tmp_path, {**ONE, "b": ONE["a"]})
    edit(path, change)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    assert opened(tmp_path, on_error="skip").names == ["b"]
    assert len(opened(tmp_path, on_error="collect").problems) == 1


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


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000])
def test_garbage_instead_of_json(tmp_path, content):
    write(tmp_path, ONE).write_bytes(content)
    _, message = outcome(CocoPanopticDataModule, tmp_path)
    assert "panoptic_val2017.json" in message


@pytest.mark.parametrize("picture", [Image.new("RGB", (3, 2)), Image.new("L", (2, 2))])
def test_maps_of_other_size_or_mode_are_named(tmp_path, picture):
    picture.save(write(tmp_path, ONE).with_suffix("") / "a.png")
    with pytest.raises(UserError, match=r"a\.png is a .* map of . channel\(s\), its image a\.jpg needs a 2x2 map of 3"):
        opened(tmp_path)[0]


def test_missing_files_and_other_classes(tmp_path):
    with pytest.raises(UserError, match=r"panoptic_val2017\.json does not exist: check dataset\.root"):
        CocoPanopticDataModule(tmp_path)
    write(tmp_path, ONE)
    write(tmp_path, ONE, CATEGORIES[::-1], "train")
    data = CocoPanopticDataModule(tmp_path)
    assert len(data.make_dataset("val", None)) == 1
    with pytest.raises(UserError, match=r"panoptic_train2017\.json has other categories .* from number 0 on"):
        data.make_dataset("train", None)
    with pytest.raises(UserError, match=r"nowhere does not exist: check dataset\.root"):
        CocoPanopticDataModule(tmp_path, val_images="nowhere").make_dataset("val", None)


def test_two_real_photographs(reference):
    """Two images of COCO with 50 segments; every segment has the area that COCO's JSON gives."""
    folder = reference / "panoptic_quality" / "coco_sample"
    files = {"val_json": "panoptic.json", "val_maps": "panoptic", "val_images": "images"}
    data = CocoPanopticDataModule(folder, **files)
    assert data.info.num_classes == 133
    assert len(data.info.thing_classes) == 80
    samples = list(data.make_dataset("val", None))
    assert [sample.name for sample in samples] == ["000000142238", "000000439180"]
    assert sum(len(sample.segments) for sample in samples) == 50
    content = json.loads((folder / "panoptic.json").read_text())
    listed = {a["image_id"]: a["segments_info"] for a in content["annotations"]}
    for sample in samples:
        segments = listed[int(sample.name)]
        areas = torch.bincount(sample.panoptic.flatten(), minlength=len(segments) + 1)[1:]
        assert areas.tolist() == [s["area"] for s in segments]
        assert [s.is_crowd for s in sample.segments] == [bool(s["iscrowd"]) for s in segments]
        assert [data.info.category_ids[s.class_id] for s in sample.segments] == [s["category_id"] for s in segments]


CONTENT = {
    "images": [{"id": 7, "file_name": "7.png", "height": 16, "width": 24}],
    "annotations": [
        {
            "image_id": 7,
            "file_name": "7.png",
            "segments_info": [segment(i, 3, area=2) for i in (7, 11, 24000, 26012)],
        }
    ],
    "categories": [{"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]}],
}


def places(node, path=()):
    """The paths to all values of a JSON."""
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


def replaced(place, value):
    """`CONTENT` with another value at a place."""
    if not place:
        return value
    content = parent = json.loads(json.dumps(CONTENT))
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return content


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An image with its map, whose JSON is to be written; and another JSON's folder."""
    root = tmp_path_factory.mktemp("coco")
    for folder, array in (("images", PHOTO), ("gt", id_to_rgb(IDS.astype(np.int32)))):
        (root / folder).mkdir()
        (root / folder / "7.png").write_bytes(encoded(array, "PNG"))
    (root / "pred").symlink_to(root / "gt")
    return root


WRONG_JSONS = st.one_of(
    st.tuples(st.sampled_from(list(places(CONTENT))), JUNK).map(lambda p: json.dumps(replaced(*p)).encode()),
    damages.map(lambda damage: damage(json.dumps(CONTENT).encode())),
)


@settings(max_examples=100, deadline=5000)
@given(WRONG_JSONS)
def test_a_wrong_json_ends_in_one_line_or_does_not_matter(small, content):
    path = small / "gt.json"
    path.write_bytes(content)
    sample, message = outcome(lambda: CocoPanopticDataset(path, small / "images")[0])
    if message:
        assert str(small) in message
    else:
        assert np.array_equal(sample.panoptic == 0, IDS == 0)
        assert {segment.class_id for segment in sample.segments} == {0}


# Ground truth and prediction.


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WRONG_JSONS, st.booleans())
def test_a_wrong_json_of_a_pair_ends_in_one_line(small, content, in_truth):
    files = small / "gt.json", small / "pred.json"
    for path, wrong in zip(files, (in_truth, not in_truth), strict=True):
        path.write_bytes(content if wrong else json.dumps(CONTENT).encode())
    _, message = outcome(evaluate_panoptic_files, *files)
    assert message is None or "json" in message or "png" in message


IMAGES = {7: ([[3, 3], [0, 5]], [segment(3, 1), segment(5, 200)]), 8: ([[4, 4]], [segment(4, 1, iscrowd=1)])}


@pytest.fixture
def files(tmp_path):
    gt_json = write_panoptic(tmp_path / "gt.json", IMAGES, categories=CATEGORIES)
    return gt_json, write_panoptic(tmp_path / "pred.json", IMAGES)


def read_all(gt_json, pred_json, **folders):
    pairs = PanopticPairs(gt_json, pred_json, **folders)
    return [pairs[index] for index in range(len(pairs))]


def test_pairs_come_by_image_id_with_predictions_renumbered(files):
    edit(files[1], lambda content: content["annotations"].reverse())
    first, second = read_all(*files)
    assert first.image_id == 7
    assert first.gt_map.tolist() == [[3, 3], [0, 5]]
    assert first.pred_map.tolist() == [[1, 1], [0, 2]]
    assert [(s.id, s.class_id, s.is_thing) for s in first.pred_segments] == [(1, 1, True), (2, 0, False)]
    assert second.gt_segments[0].is_crowd


def test_folders_may_be_elsewhere(files, tmp_path):
    for name in ("gt", "pred"):
        (tmp_path / name).rename(tmp_path / f"{name}_pngs")
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/gt with the PNGs.*: give it by --gt-folder"):
        read_all(*files)
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/pred with the PNGs.*: give it by --pred-fold"):
        read_all(*files, gt_folder=tmp_path / "gt_pngs")
    assert len(read_all(*files, gt_folder=tmp_path / "gt_pngs", pred_folder=tmp_path / "pred_pngs")) == 2
    with pytest.raises(UserError, match=r"nowhere\.json does not exist: give the prediction's JSON second"):
        read_all(files[0], tmp_path / "nowhere.json")


def first(**changes):
    """Changes the first annotation."""
    return lambda content: content["annotations"][0].update(changes)


def segments(*listed):
    return first(segments_info=list(listed))


def again(content):
    content["annotations"].append(content["annotations"][0])


BROKEN = {
    "no categories": ("gt", lambda c: c.pop("categories"), r"gt\.json has no list 'categories'"),
    "empty categories": ("gt", lambda c: c["categories"].clear(), r"gt\.json has no categories"),
    "category twice": ("gt", lambda c: c["categories"].append(CATEGORIES[1]), r"gt\.json has the category id 1 twice"),
    "category without kind": ("gt", lambda c: c["categories"][1].pop("isthing"), r"gt\.json: category number 1 needs"),
    "no annotations": ("pred", lambda c: c.pop("annotations"), r"pred\.json has no list 'annotations'"),
    "nothing annotated": ("gt", lambda c: c["annotations"].clear(), r"gt\.json has no annotations"),
    "image twice": ("pred", again, r"pred\.json annotates image 7 twice"),
    "image id is a list": ("pred", first(image_id=[7]), r"pred\.json has an annotation with the image_id \[7\]"),
    "image not predicted": ("pred", first(image_id=9), r"no prediction for image 7 of .*gt\.json: predict"),
    "image id of another type": ("pred", first(image_id="7"), r"pred\.json has no prediction for image 7 .*: write"),
    "no list of segments": ("pred", first(segments_info=None), r"pred\.json: .* image 7 has no list segments_info"),
    "no PNG named": ("gt", first(file_name=""), r"gt\.json: the annotation of image 7 has the file_name ''"),
    "missing PNG": ("pred", first(file_name="x.png"), r"pred/x\.png does not exist: .*--pred-folder"),
    "unknown category": ("pred", segments(segment(3, 2)), r"pred\.json: .* 7 has the segment 3 with the cat"),
    "true void segment": ("gt", segments(segment(0, 1)), r"gt\.json: .* 7 has the segment id 0, which is not from 1"),
    "id too large": ("gt", segments(segment(2**24, 1)), r"gt\.json: .* has the segment id 16777216, which is not"),
    "id twice": ("pred", segments(segment(3, 1), segment(3, 200)), r"pred\.json: .* segment id 3 twice"),
    "area is text": ("gt", segments(segment(3, 1, area="2")), r"gt\.json: .* 7 has a segment with the area"),
    "listed without pixels": (
        "pred",
        adds(6, 1),
        r"lists the segment 6 of image 7, which has no pixels in .*7\.png",
    ),
    "pixels not listed": (
        "pred",
        segments(segment(3, 1)),
        r"pred/7\.png has the id 5, which .*json does not list",
    ),
}


@pytest.mark.parametrize(("which", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_pairs_are_named_with_their_cure(files, which, change, message):
    edit(files[which == "pred"], change)
    with pytest.raises(UserError, match=message) as caught:
        read_all(*files)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(np.zeros((2, 3, 3), np.uint8), "PNG"), r"pred/7\.png is 3x2, but .*gt/7\.png is 2x2: write pred"),
        (encoded(np.zeros((2, 2), np.uint8), "PNG"), r"pred/7\.png has no colours: a segment's id is written as RGB"),
        (encoded(PHOTO, "PNG")[:-5], r"cannot read .*pred/7\.png \(it is truncated\): write it anew"),
    ],
)
def test_broken_pngs_are_named_with_their_cure(files, tmp_path, content, message):
    (tmp_path / "pred" / "7.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_all(*files)
