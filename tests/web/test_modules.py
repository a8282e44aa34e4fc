"""The page's JavaScript against the Python that is its reference."""

import json
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("onnx", reason="needs requirements-export.txt")

from pem_lightning.deploy.postprocess import postprocess
from pem_lightning.images import resize, resized_size
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.types import ClassInfo, DatasetInfo
from tests.deploy.small_file import metadata, write_small_file
from tests.deploy.test_postprocess import CLASSES, SIZES, THINGS, noise, smooth
from tests.web.node import ORT, run_node, write_array

INFO = DatasetInfo("toy", tuple(ClassInfo(f"class {i}", (i, 9, 9), i in THINGS, 3 * i + 2) for i in range(CLASSES)))
WIDE = DatasetInfo("wide", tuple(ClassInfo(f"class {i}", (i, 9, 9), False, 300 * i) for i in range(CLASSES)))
RULES = {"resize_first": True, "object_mask_threshold": 0.3, "overlap_threshold": 0.4, "top_k": 30}
NAMES = {
    "resize_first": "resizeFirst",
    "object_mask_threshold": "objectMaskThreshold",
    "overlap_threshold": "overlapThreshold",
    "top_k": "topK",
}


def quarter(image_size):
    return tuple(-(-side // 32) * 8 for side in image_size)


class Comparison:
    """Cases that Node runs at once, and what Python makes of them."""

    def __init__(self, folder):
        self.folder = folder
        self.cases, self.expected = [], []

    def add(self, task, logits, image_size, output_size, info=INFO, **rules):
        name = f"case{len(self.cases)}"
        classes, masks = (value.numpy() for value in logits)
        write_array(self.folder / f"{name}_classes.f32", classes)
        write_array(self.folder / f"{name}_masks.f32", masks)
        rules = RULES | rules
        options = {
            "task": task,
            "things": sorted(info.thing_classes),
            "imageSize": image_size,
            "outputSize": output_size,
            **{NAMES[key]: value for key, value in rules.items()},
        }
        described = {"maskSize": masks.shape[1:], "options": options, "classes": info.to_dict()["classes"]}
        self.cases.append({"job": "postprocess", "name": name, **described})
        sizes = {"image_size": image_size, "output_size": output_size}
        result = postprocess(classes, masks, task=task, thing_classes=info.thing_classes, **sizes, **rules)
        image = np.zeros((*output_size, 3), np.uint8)
        self.expected.append(SegmentedImage(name, image, info, result, task))

    def check(self):
        for expected, found in zip(self.expected, run_node(self.folder, self.cases), strict=True):
            (self.folder / "python").mkdir(exist_ok=True)
            files = expected.save(self.folder / "python", overlay=False)
            assert [file.name for file in files] == found["files"]
            for file in files:
                assert_same_file(file, self.folder / file.name)
            if expected.panoptic is not None:
                described = [(s.id, s.class_id, s.is_thing, s.area, list(s.box)) for s in expected.segments]
                keys = ("id", "classId", "isThing", "area", "box")
                assert [tuple(s[key] for key in keys) for s in found["segments"]] == described
                continue
            if expected.semantic is not None:
                counts = np.bincount(expected.semantic.ravel(), minlength=CLASSES)
                areas = {s["classId"]: s["area"] for s in found["segments"]}
                assert areas == {k: n for k, n in enumerate(counts.tolist()) if n}


def assert_same_file(file, other):
    if file.suffix == ".png":
        with Image.open(file) as one, Image.open(other) as two:
            assert one.mode == two.mode
            assert np.array_equal(one, two), file.name
        return
    one, two = (json.loads(path.read_text()) for path in (file, other))
    assert [{**entry, "score": 0} for entry in two] == [{**entry, "score": 0} for entry in one], file.name
    assert [e["score"] for e in two] == pytest.approx([e["score"] for e in one], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_postprocessing(task, tmp_path):
    """Files with the same pixels, ids, classes, areas, boxes, run lengths, also at other sizes than the network's."""
    comparison = Comparison(tmp_path)
    for (image_size, output_size), resize_first in product(SIZES, (True, False)):
        size = quarter(image_size)
        cases = [smooth(i, size, 20, sharpness) for i, sharpness in enumerate((1.0, 8.0, 30.0))]
        for logits in (*cases, noise(9, size, 12)):
            comparison.add(task, logits, image_size, output_size, resize_first=resize_first)
    comparison.check()
    found = [len(result.segments) or len(result.instances or ()) for result in comparison.expected]
    assert max(found) > 3 or task == "semantic"


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
@pytest.mark.parametrize("output_size", [(64, 96), (100, 77)])
def test_ties_and_extremes(task, output_size, tmp_path):
    """Equal queries, masks without a pixel, logits of 0 and beyond what an exponential can hold, no segment at all."""
    comparison = Comparison(tmp_path)
    classes, masks = smooth(4, (16, 24), 10, 5.0)
    twice = torch.cat([classes, classes]), torch.cat([masks, masks])
    nothing = classes, torch.full_like(masks, -3.0)
    far_below = classes, torch.full_like(masks, -200.0)
    zero = torch.zeros_like(classes), torch.zeros_like(masks)
    large = classes, torch.sign(masks) * 1e4
    none = classes - 50 * F.one_hot(torch.arange(CLASSES), CLASSES + 1).sum(0), masks
    for logits, resize_first in product((twice, nothing, far_below, zero, large, none), (True, False)):
        rules = {"object_mask_threshold": 0.1, "overlap_threshold": 0.3, "resize_first": resize_first}
        comparison.add(task, logits, (64, 96), output_size, **rules)
    comparison.check()


def test_official_ids_of_16_bits(tmp_path):
    comparison = Comparison(tmp_path)
    comparison.add("semantic", smooth(1, (16, 24), 9, 5.0), (64, 96), (64, 96), info=WIDE)
    comparison.check()
    with Image.open(tmp_path / "case0_semantic.png") as image:
        assert image.mode == "I;16"


def test_resizing_is_pillows(tmp_path):
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for height, width, rule in [
        (97, 131, {"shortest_edge": 36, "max_size": 144}),
        (61, 40, {"shortest_edge": 90, "max_size": None}),
        (50, 400, {"shortest_edge": 45, "max_size": 200}),
        (90, 120, {"shortest_edge": 90}),
        (33, 1, {"shortest_edge": 7}),
        (5, 3000, {"shortest_edge": 8, "max_size": 64}),
    ]:
        name = f"image{len(cases)}"
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        image[: height // 3] = 255
        write_array(tmp_path / f"{name}.rgb", image)
        cases.append({"job": "resize", "name": name, "from": (height, width), "rule": rule})
        expected.append(resize(image, resized_size(height, width, **rule)))
    for case, image, found in zip(cases, expected, run_node(tmp_path, cases), strict=True):
        assert tuple(found["size"]) == image.shape[:2]
        assert (tmp_path / f"{case['name']}.resized").read_bytes() == image.tobytes()


def test_metadata_and_files_that_are_not_ours(tmp_path):
    import onnx

    path = write_small_file(tmp_path / "good.onnx")
    model = onnx.load(path)
    text = model.metadata_props[0].value
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-9])
    (tmp_path / "photo.onnx").write_bytes(b"\xff\xd8\xff\xe0 no model at all")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, value in {
        "newer.onnx": text.replace('"format_version": 1', '"format_version": 2'),
        "odd.onnx": "{",
    }.items():
        model.metadata_props[0].value = value
        onnx.save(model, tmp_path / name)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    names = ["good", "cut", "photo", "empty", "newer", "odd", "foreign"]
    good, *bad = run_node(tmp_path, [{"job": "metadata", "name": f"{name}.onnx"} for name in names])
    assert good == json.loads(metadata().to_json())
    assert [answer["error"] for answer in bad] == [
        "cut.onnx cannot be opened: it is damaged, or no .onnx file",
        "photo.onnx cannot be opened: it is damaged, or no .onnx file",
        "empty.onnx cannot be opened: it is damaged, or no .onnx file",
        "newer.onnx was exported by a newer version: update this page, or export the checkpoint again",
        "the metadata of odd.onnx cannot be read: export the checkpoint again",
        "foreign.onnx says nothing about classes and sizes: it was not written by export.py",
    ]


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_whole_way_with_onnxruntime(task, tmp_path):
    """From pixels to files as `Runtime` does it, by onnxruntime-web in Node."""
    runtime = pytest.importorskip("pem_lightning.deploy").Runtime
    pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    ort = ORT / "ort.node.min.mjs"
    if not ort.is_file():
        pytest.skip("needs onnxruntime-web: npm ci in web/")
    rules = json.loads(metadata().to_json())["task"] | {"name": task}
    path = write_small_file(tmp_path / "small.onnx", task=rules, resize={"shortest_edge": 64, "max_size": 128})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    photo = np.asarray(Image.fromarray(pixels).resize((206, 103), Image.Resampling.BICUBIC))
    write_array(tmp_path / "photo.rgb", photo)
    case = {"job": "segment", "name": "photo", "file": path.name, "size": photo.shape[:2], "ort": ort.as_uri()}
    (found,) = run_node(tmp_path, [case])
    assert found["networkSize"] == [64, 128]
    expected = runtime(path)(photo, "photo")
    for file in expected.save(tmp_path / "python", overlay=False):
        assert_same_file(file, tmp_path / file.name)
