import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from pem_lightning.inference import regions
from pem_lightning.inference.exchange import ExchangeFiles
from pem_lightning.inference.regions import outlines
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.types import ClassInfo, DatasetInfo, Instance, Result, Segment, UserError
from scripts import import_data
from tests.jobs import in_child
from tests.test_package import run_hidden

INFO = DatasetInfo(
    "toy",
    (
        ClassInfo("car", (0, 0, 142), True, 26),
        ClassInfo("sky", (70, 130, 180), False, 23),
        ClassInfo("traffic & <sign>", (1, 2, 3), True, 7),
    ),
)
MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans())


def blob(seed, size=(40, 60), above=0.5):
    """Regions of all forms, with holes, and holes in them."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), 1.5)
    return noise > np.quantile(noise, above)


def decoded(polygons, size):
    """The pixels of COCO's polygons."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))) > 0


@pytest.fixture(params=["tensors", "arrays"])
def convert(request):
    """What `Predictor` and `deploy.Runtime` return."""
    return torch.from_numpy if request.param == "tensors" else np.asarray


@pytest.fixture(params=["panoptic", "semantic", "instance"])
def example(request, convert, tmp_path):
    """A result of a photograph, and its objects: class index, score and mask."""
    size, task = (40, 60), request.param
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    path = tmp_path / "photos" / "a.b.png"
    path.parent.mkdir()
    Image.fromarray(image).save(path)
    if task == "instance":
        objects = [(0, 0.9, blob(0)), (2, 0.75, blob(1, above=0.7)), (0, 0.5, blob(2, above=0.9))]
        instances = tuple(Instance(convert(mask), k, score) for k, score, mask in objects)
        result = Result(instances=(*instances, Instance(convert(np.zeros(size, bool)), 0, 0.1)))
    else:
        where = blob(3).astype(np.int32) + blob(4, above=0.8)
        classes = [0, 1, 2] if task == "semantic" else [1, 0, 0]
        scores = [None, None, None] if task == "semantic" else [0.9, 0.8, 0.7]
        objects = [(classes[i], scores[i], where == i) for i in range(3)]
        ids = np.array([7, 300, 2], np.int32)
        segments = tuple(
            Segment(int(i), k, k == 0, score=s) for i, (k, s, _) in zip(ids, objects, strict=True) if s is not None
        )
        result = Result(panoptic=convert(ids[where]), segments=segments)
        if task == "semantic":
            result = Result(semantic=convert(where.astype(np.int32)))
    return SegmentedImage("a.b", image, INFO, result, task, path), objects


class TestOutlines:
    @settings(deadline=None, max_examples=300)
    @given(MASKS)
    def test_the_mask_comes_back_to_the_pixel(self, mask):
        polygons = outlines(mask)
        assert len(polygons) == ndimage.label(mask, np.ones((3, 3)))[1]
        if polygons:
            assert (decoded([p.ravel().tolist() for p in polygons], mask.shape) == mask).all()
        signed = sum(np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1)) / 2 for p in polygons)
        assert signed == mask.sum()  # by the non-zero rule, too: holes are walked in the other direction

    def test_a_large_region_with_many_holes(self):
        mask = np.random.default_rng(0).random((150, 200)) < 0.6
        polygons = [p.ravel().tolist() for p in outlines(mask)]
        assert max(map(len, polygons)) > 10_000
        assert (decoded(polygons, mask.shape) == mask).all()

    def test_a_hole_and_an_island_in_it(self):
        mask = np.ones((9, 12), bool)
        mask[2:7, 3:9] = False
        mask[4, 5] = True
        outer, island = outlines(mask)
        assert [0, 0] in outer.tolist()
        assert len(outer) == 4 + 4 + 2
        assert island.tolist() == [[5, 4], [6, 4], [6, 5], [5, 5]]

    def test_others_fill_it_alike(self):
        cv2 = pytest.importorskip("cv2")
        mask = blob(0)
        large = np.repeat(np.repeat(mask, 8, 0), 8, 1)  # both draw the outline itself, half a pixel wide
        inside = ndimage.binary_erosion(large, iterations=2), ndimage.binary_dilation(large, iterations=2)
        picture = Image.new("1", large.shape[::-1])
        filled = np.zeros(large.shape, np.uint8)
        for polygon in outlines(large):
            ImageDraw.Draw(picture).polygon([tuple(p) for p in polygon.tolist()], fill=1)
            cv2.fillPoly(filled, [polygon.astype(np.int32)], 1)
        for drawn in (np.asarray(picture), filled > 0):
            assert drawn[inside[0]].mean() > 0.99
            assert drawn[~inside[1]].mean() < 0.01  # but for the seams

    @pytest.mark.parametrize("tolerance", [0.5, 1, 3])
    def test_simplified(self, tolerance):
        pytest.importorskip("cv2")
        mask = blob(5, (120, 160), above=0.7)
        polygons = outlines(mask, tolerance)
        assert len(polygons) == len(outlines(mask))
        assert sum(map(len, polygons)) < sum(map(len, outlines(mask))) * (0.9 if tolerance < 1 else 0.5)
        found = decoded([p.ravel().tolist() for p in polygons], mask.shape)
        near = ndimage.distance_transform_edt(
            ~(mask ^ ndimage.binary_erosion(mask) | ndimage.binary_dilation(mask) ^ mask)
        )
        assert (near[found != mask] <= tolerance + 1).all()

    def test_impossible_tolerances(self, monkeypatch):
        with pytest.raises(UserError, match="tolerance=-1: give 0 for exact outlines"):
            outlines(blob(0), -1)
        monkeypatch.setattr(regions, "opencv", lambda: None)
        assert outlines(blob(0))
        with pytest.raises(UserError, match="needs OpenCV: pip install opencv-python-headless"):
            outlines(blob(0), 1)


def test_polygons(example):
    result, objects = example
    found = result.polygons()
    assert [(f.class_id, f.name, f.score) for f in found] == [(k, INFO.classes[k].name, s) for k, s, _ in objects]
    for one, (_, _, mask) in zip(found, objects, strict=True):
        assert (decoded([p.ravel().tolist() for p in one.polygons], mask.shape) == mask).all()


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_by_pycocotools(example, tmp_path, polygons):
    result, objects = example
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(result.to_coco(polygons=polygons)))
    coco = COCO(path)
    assert coco.loadImgs([1]) == [{"id": 1, "file_name": "a.b.png", "width": 60, "height": 40}]
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {
        c.category_id: c.name for c in INFO.classes
    }
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert len(annotations) == len(objects)
    for annotation, (k, score, mask) in zip(annotations, objects, strict=True):
        assert isinstance(annotation["segmentation"], list) == polygons
        assert (coco.annToMask(annotation) > 0).tolist() == mask.tolist()
        assert annotation["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert (annotation["category_id"], annotation.get("score")) == (INFO.classes[k].category_id, score)


def test_labelme_through_our_own_import(example, tmp_path):
    """Into objects of a COCO data set, and pixel for pixel."""
    result, objects = example
    for split in ("train", "val"):
        folder = tmp_path / "labelme" / split
        folder.mkdir(parents=True)
        Image.fromarray(result.image).save(folder / "a.b.png")
        (folder / "a.b.json").write_text(json.dumps(result.to_labelme()))
    assert import_data.main(["labelme", str(tmp_path / "labelme"), str(tmp_path / "out")]) == 0
    coco = COCO(tmp_path / "out" / "annotations" / "instances_val2017.json")
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    found = [(names[a["category_id"]], coco.annToMask(a) > 0) for a in coco.loadAnns(coco.getAnnIds())]
    assert [name for name, _ in found] == [INFO.classes[k].name for k, _, _ in objects]
    for (_, mask), (_, _, expected) in zip(found, objects, strict=True):
        assert (mask == expected).all()


def from_cvat(image):
    """Masks of an image of CVAT's XML by its documentation: run lengths in the rows of a box."""
    size = int(image.get("height")), int(image.get("width"))
    for entry in image.iter("mask"):
        left, top, width, height = (int(entry.get(key)) for key in ("left", "top", "width", "height"))
        lengths = list(map(int, entry.get("rle").split(",")))
        assert sum(lengths) == width * height
        mask = np.zeros(size, bool)
        values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        mask[top : top + height, left : left + width] = values.reshape(height, width)
        yield entry, mask


def test_cvat(example):
    result, objects = example
    root = ElementTree.fromstring(result.to_cvat())
    assert [label.findtext("name") for label in root.iter("label")] == list(INFO.class_names)
    (image,) = root.iter("image")
    assert image.get("name") == "a.b.png"
    expected = sorted(objects, key=lambda one: one[1] or 0)  # the best lies on top
    found = list(from_cvat(image))
    assert [int(entry.get("z_order")) for entry, _ in found] == [0, 1, 2]
    for (entry, mask), (k, _, wanted) in zip(found, expected, strict=True):
        assert entry.get("label") == INFO.classes[k].name
        assert (mask == wanted).all()
    (image,) = ElementTree.fromstring(result.to_cvat(polygons=True)).iter("image")
    groups = [entry.get("group_id") for entry in image.iter("polygon")]
    points = [[float(v) for v in entry.get("points").replace(";", ",").split(",")] for entry in image.iter("polygon")]
    for number, (_, _, wanted) in enumerate(expected, start=1):
        ours = [p for p, group in zip(points, groups, strict=True) if group == str(number)]
        if ours:  # of several parts
            assert (decoded(ours, wanted.shape) == wanted).all()
    assert len(set(groups)) > 1


def test_cvat_by_datumaro(example, tmp_path):
    """As `scripts/import_data.py cvat` reads it."""
    pytest.importorskip("datumaro")
    result, objects = example
    (tmp_path / "cvat" / "images").mkdir(parents=True)
    (tmp_path / "cvat" / "annotations.xml").write_text(result.to_cvat())
    Image.fromarray(result.image).save(tmp_path / "cvat" / "images" / "a.b.png")
    (item,) = import_data.read_datumaro(tmp_path / "cvat", "cvat").items
    expected = sorted(objects, key=lambda one: one[1] or 0)
    assert [shape.label for shape in item.shapes] == [INFO.classes[k].name for k, _, _ in expected]
    for shape, (_, _, mask) in zip(item.shapes, expected, strict=True):
        assert (coco_mask.decode(shape.pixels) == mask).all()


class TestSupervision:
    def test_detections(self, example):
        supervision = pytest.importorskip("supervision")
        result, objects = example
        found = result.to_supervision()
        assert isinstance(found, supervision.Detections)
        assert found.class_id.tolist() == [k for k, _, _ in objects]
        assert found.data["class_name"].tolist() == [INFO.classes[k].name for k, _, _ in objects]
        assert found.mask.tolist() == [mask.tolist() for _, _, mask in objects]
        assert found.area.tolist() == [mask.sum() for _, _, mask in objects]
        assert (found.xyxy - supervision.mask_to_xyxy(found.mask)).tolist() == [[0, 0, 1, 1]] * 3
        if objects[0][1] is None:
            assert found.confidence is None
        else:
            assert found.confidence.tolist() == pytest.approx([s for _, s, _ in objects])
            assert found[found.confidence > 0.8].class_id[0] == objects[0][0]
        drawn = supervision.MaskAnnotator().annotate(result.image.copy(), found)
        assert (drawn != result.image).any()
        labelled = supervision.LabelAnnotator().annotate(result.image.copy(), found)  # which reads class_name
        assert (labelled != result.image).any()

    def test_nothing_found(self):
        pytest.importorskip("supervision")
        found = SegmentedImage("x", np.zeros((4, 5, 3), np.uint8), INFO, Result(), "instance").to_supervision()
        assert (len(found), found.is_empty()) == (0, True)

    def test_without_it(self, example, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(UserError, match="needs the package supervision: pip install supervision"):
            example[0].to_supervision()


def test_nothing_found():
    result = SegmentedImage("x", np.zeros((4, 5, 3), np.uint8), INFO, Result(), "instance")
    assert result.polygons() == []
    assert result.to_coco()["annotations"] == []
    assert result.to_labelme("x.jpg")["shapes"] == []
    assert "<mask" not in result.to_cvat()


def test_without_torch_and_opencv():
    code = """
import numpy as np
from pem_lightning.basic_types import ClassInfo, DatasetInfo, Result, Segment
from pem_lightning.inference.results import SegmentedImage

info = DatasetInfo("toy", (ClassInfo("car", (0, 0, 142), True, 26),))
found = Result(panoptic=np.eye(4, dtype=np.int32), segments=(Segment(1, 0, True, score=0.5),))
result = SegmentedImage("x", np.zeros((4, 4, 3), np.uint8), info, found, "panoptic")
print(len(result.polygons()), result.to_coco()["annotations"][0]["area"], result.to_labelme()["imagePath"])
print("rle" in result.to_cvat())
"""
    assert run_hidden(code).split() == ["1", "4", "x.jpg", "True"]


def test_files_of_several_images(tmp_path, example):
    result, _ = example
    second = SegmentedImage("c", result.image, INFO, Result(), "instance")
    results = ExchangeFiles(tmp_path / "out", ["coco", "coco_polygons", "labelme", "cvat"]).passing([result, second])
    assert list(results) == [result, second]
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert names == ["coco.json", "coco_polygons.json", "cvat.xml", "labelme/a.b.json", "labelme/c.json"]
    coco = COCO(tmp_path / "out" / "coco.json")
    assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == ["a.b.png", "c.jpg"]
    assert {a["image_id"] for a in coco.loadAnns(coco.getAnnIds())} == {1}
    images = ElementTree.parse(tmp_path / "out" / "cvat.xml").iter("image")
    assert [len(list(from_cvat(image))) for image in images] == [3, 0]
    path = tmp_path / "out" / "labelme" / "a.b.json"
    assert (path.parent / json.loads(path.read_text())["imagePath"]).resolve() == result.file.resolve()
    assert json.loads((path.with_name("c.json")).read_text())["imagePath"] == "c.jpg"


@pytest.mark.slow
class TestPredict:
    """`predict.py formats=...`."""

    def test_files(self, tmp_path):
        for name in ("a", "b"):
            Image.effect_noise((90, 60), 80).save(tmp_path / f"{name}.png")
        out = tmp_path / "out"
        arguments = (f"input={tmp_path}/*.png", f"output={out}", "save=overlays", f"hydra.run.dir={tmp_path}/run")
        assert in_child("checkpoint=camvid", *arguments, "formats=[coco,labelme]", job="predict") == 0
        assert sorted(p.name for p in out.iterdir()) == ["a_overlay.png", "b_overlay.png", "coco.json", "labelme"]
        coco = COCO(out / "coco.json")
        for image in coco.loadImgs(coco.getImgIds()):
            found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
            assert sum(a["area"] for a in found) == sum(coco.annToMask(a).sum() for a in found) == 90 * 60

    def test_mistakes(self, tmp_path, capfd):
        Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
        (tmp_path / "b.mp4").touch()
        arguments = ("checkpoint=camvid", f"output={tmp_path}/out", f"hydra.run.dir={tmp_path}/run")
        assert in_child(*arguments, f"input={tmp_path}/a.png", "formats=labelm", job="predict") == 2
        assert "there is no formats=labelm (did you mean labelme?); choose some of: coco," in capfd.readouterr().err
        assert in_child(*arguments, f"input={tmp_path}", "formats=coco", job="predict") == 2
        assert "b.mp4 is a video: leave it out" in capfd.readouterr().err
