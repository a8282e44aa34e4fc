import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.coco import PanopticPairs
from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import UserError
from tests.panoptic_files import CATEGORIES, segment, write_panoptic

IMAGES = {7: ([[3, 3], [0, 5]], [segment(3, 1), segment(5, 200)]), 8: ([[4, 4]], [segment(4, 1, iscrowd=1)])}


@pytest.fixture
def files(tmp_path):
    gt_json = write_panoptic(tmp_path / "gt.json", IMAGES, categories=CATEGORIES)
    return gt_json, write_panoptic(tmp_path / "pred.json", IMAGES)


def read_all(gt_json, pred_json, **folders):
    pairs = PanopticPairs(gt_json, pred_json, **folders)
    return [pairs[index] for index in range(len(pairs))]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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


def first(**changes):
    """Changes the first annotation."""
    return lambda content: content["annotations"][0].update(changes)


BROKEN = {
    "no categories": ("gt", lambda c: c.pop("categories"), r"gt\.json has no list 'categories'"),
    "empty categories": ("gt", lambda c: c["categories"].clear(), r"gt\.json has no categories"),
    "category twice": ("gt", lambda c: c["categories"].append(CATEGORIES[1]), r"gt\.json has the category id 1 twice"),
    "category without kind": ("gt", lambda c: c["categories"][1].pop("isthing"), r"gt\.json: category number 1 needs"),
    "category id is text": ("gt", lambda c: c["categories"][0].update(id="a"), r"gt\.json: category number 0 needs"),
    "no annotations": ("pred", lambda c: c.pop("annotations"), r"pred\.json has no list 'annotations'"),
    "nothing annotated": ("gt", lambda c: c["annotations"].clear(), r"gt\.json has no annotations"),
    "annotation is no object": (
        "pred",
        lambda c: c["annotations"].append(3),
        r"pred\.json has entries in 'annotations'",
    ),
    "image twice": (
        "pred",
        lambda c: c["annotations"].append(c["annotations"][0]),
        r"pred\.json annotates image 7 twice",
    ),
    "true image twice": (
        "gt",
        lambda c: c["annotations"].append(c["annotations"][0]),
        r"gt\.json annotates image 7 twice",
    ),
    "image id is a list": ("pred", first(image_id=[7]), r"pred\.json has an annotation with the image_id \[7\]"),
    "image not predicted": (
        "pred",
        first(image_id=9),
        r"pred\.json has no prediction for image 7 of .*gt\.json: predict",
    ),
    "image id of another type": (
        "pred",
        first(image_id="7"),
        r"pred\.json has no prediction for image 7 .*: write its",
    ),
    "no list of segments": (
        "pred",
        first(segments_info=None),
        r"pred\.json: the annotation of image 7 has no list segm",
    ),
    "no PNG named": ("gt", first(file_name=""), r"gt\.json: the annotation of image 7 has the file_name ''"),
    "missing PNG": ("pred", first(file_name="x.png"), r"pred/x\.png does not exist: .*--pred-folder"),
    "missing true PNG": ("gt", first(file_name="x.png"), r"gt/x\.png does not exist: .*--gt-folder"),
    "unknown category": (
        "pred",
        first(segments_info=[segment(3, 2)]),
        r"pred\.json: .* 7 has the segment 3 with the cat",
    ),
    "true void segment": ("gt", first(segments_info=[segment(0, 1)]), r"gt\.json: .* 7 has a segment with the id 0"),
    "id too large": ("gt", first(segments_info=[segment(2**24, 1)]), r"gt\.json: .* has the segment id 16777216: ids"),
    "id is text": ("pred", first(segments_info=[segment("3", 1)]), r"pred\.json: .* has the segment id '3': ids"),
    "id twice": ("pred", first(segments_info=[segment(3, 1), segment(3, 200)]), r"pred\.json: .* segment id 3 twice"),
    "true id twice": ("gt", first(segments_info=[segment(3, 1), segment(3, 200)]), r"gt\.json: .* segment id 3 twice"),
    "area is text": (
        "gt",
        first(segments_info=[segment(3, 1, area="2")]),
        r"gt\.json: .* 7 has a segment with the area",
    ),
    "listed without pixels": (
        "pred",
        lambda c: c["annotations"][0]["segments_info"].append(segment(6, 1)),
        r"pred\.json lists the segment 6 of image 7, which has no pixels in .*pred/7\.png: list only",
    ),
    "pixels not listed": (
        "pred",
        lambda c: c["annotations"][0]["segments_info"].pop(),
        r"pred/7\.png has the id 5, which its entry in .*pred\.json does not list: list every",
    ),
}


@pytest.mark.parametrize(("which", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_jsons_are_named_with_their_cure(files, which, change, message):
    edit(files[which == "pred"], change)
    with pytest.raises(UserError, match=message) as caught:
        read_all(*files)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_files_that_are_no_json(files, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json does not exist: give the prediction's JSON second"):
        read_all(files[0], tmp_path / "nowhere.json")
    files[0].write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*gt\.json"):
        read_all(*files)
    files[0].write_text("[]")
    with pytest.raises(UserError, match=r"gt\.json has no list 'annotations'"):
        read_all(*files)


def places(node, path=()):
    """The paths to all values of a JSON."""
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


CONTENT = {
    "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": [segment(3, 1, area=2), segment(5, 200)]}],
    "categories": CATEGORIES,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([10**400, "\n"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", "category_id"]), inner),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(places(CONTENT))), VALUES, st.booleans())
def test_a_wrong_value_anywhere_ends_in_one_line_or_does_not_matter(files, place, value, in_truth):
    content = json.loads(json.dumps(CONTENT))
    if place:
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
    else:
        content = value
    for path, wrong in zip(files, (in_truth, not in_truth), strict=True):
        path.write_text(json.dumps(content if wrong else CONTENT))
    message = "json"
    try:
        evaluate_panoptic_files(*files)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert "json" in message or "png" in message


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 3), np.uint8), r"pred/7\.png is 3x2, but .*gt/7\.png is 2x2: write predictions at"),
        (np.zeros((2, 2), np.uint8), r"pred/7\.png has no colours: a segment's id is written as RGB"),
        (None, r"pred/7\.png is no PNG file.*: write it anew"),
    ],
)
def test_broken_pngs_are_named_with_their_cure(files, tmp_path, array, message):
    png = tmp_path / "pred" / "7.png"
    png.write_text("text") if array is None else Image.fromarray(array).save(png)
    with pytest.raises(UserError, match=message):
        read_all(*files)


def test_a_truncated_png_is_refused(files, tmp_path):
    png = tmp_path / "gt" / "8.png"
    png.write_bytes(png.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cannot read .*gt/8\.png \(it is truncated\): write it anew"):
        read_all(*files)
