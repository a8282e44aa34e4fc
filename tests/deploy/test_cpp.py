"""The C++ example, built and run as its users do."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pem_lightning.deploy.export import save, to_onnx, trace
from pem_lightning.deploy.merge import OUTPUTS, SemanticGraph
from pem_lightning.deploy.sessions import open_session
from tests.deploy.small_file import CLASS_LOGITS, INFO, metadata, write_small_file
from tests.jobs import ROOT, unchecked_shapes

pytestmark = pytest.mark.slow

HEADERS = (
    os.environ.get("ONNXRUNTIME_INCLUDE", ""),
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`segment`, built with the library of the Python package."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    headers = next((h for h in HEADERS if h and Path(h, "onnxruntime_cxx_api.h").is_file()), None)
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if not shutil.which("cmake") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    if headers is None:
        pytest.skip(
            "needs ONNX Runtime's headers: apt install libonnxruntime-dev, or their folder as ONNXRUNTIME_INCLUDE"
        )
    if library is None:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    folder = tmp_path_factory.mktemp("cpp")
    linked = folder / "libonnxruntime.so.1"  # the name that programs look for, which the package lacks
    linked.symlink_to(library)
    options = (f"-DONNXRUNTIME_INCLUDE={headers}", f"-DONNXRUNTIME_LIB={linked}", "-DCMAKE_CXX_FLAGS=-Wall -Werror")
    for command in (["-S", ROOT / "deploy" / "cpp", "-B", folder / "build", *options], ["--build", folder / "build"]):
        subprocess.run(["cmake", *command], check=True, timeout=300)
    return folder / "build" / "segment"


class RedGreenBlue(nn.Module):
    """Three queries that see what is red, green and blue, in the place of a network."""

    def forward(self, images):
        channels = images.permute(0, 3, 1, 2).float()
        mask_logits = (F.avg_pool2d(channels, 4, ceil_mode=True) - 128) / 8
        return torch.from_numpy(CLASS_LOGITS).expand(images.shape[0], -1, -1), mask_logits


@pytest.fixture(scope="module")
def model():
    """`RedGreenBlue` with results=semantic."""
    pytest.importorskip("onnxscript", reason="needs requirements-export.txt")
    with unchecked_shapes():
        return to_onnx(trace(SemanticGraph(RedGreenBlue())), outputs=OUTPUTS["semantic"])


@pytest.fixture
def exported(program, model, tmp_path):
    save(model, tmp_path / "good.onnx", metadata(results="semantic"))
    return tmp_path / "good.onnx"


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.fixture
def photo(tmp_path):
    """Of a size that the network pads."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    image = Image.fromarray(pixels).resize((331, 205))
    image.save(tmp_path / "photo.ppm")
    return tmp_path / "photo.ppm"


def test_map_and_shares_are_onnxruntimes(program, exported, photo, tmp_path):
    session = open_session(exported)
    (expected,) = session.run(np.asarray(Image.open(photo))[None])
    ran = run(program, exported, photo, tmp_path / "classes.png")
    assert (ran.returncode, ran.stderr) == (0, "")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.mode == "L"
        assert np.array_equal(image, expected[0])
    classes, counts = np.unique(expected, return_counts=True)
    assert len(classes) == 3
    names = session.metadata.dataset_info.class_names
    assert ran.stdout.splitlines() == [
        f"{index:3} {100 * count / expected.size:6.2f} %  {names[index]}"
        for index, count in zip(classes, counts, strict=True)
    ]


def test_a_comment_in_the_photo_and_a_note_about_its_size(program, exported, model, photo, tmp_path):
    resize = {"shortest_edge": 64, "max_size": 128}
    save(model, tmp_path / "resized.onnx", metadata(results="semantic", resize=resize))
    commented = tmp_path / "commented.ppm"
    commented.write_bytes(photo.read_bytes().replace(b"P6\n", b"P6\n# by a camera\n", 1))
    assert run(program, exported, photo, tmp_path / "a.png").returncode == 0
    ran = run(program, tmp_path / "resized.onnx", commented, tmp_path / "b.png")
    assert ran.stderr == f'note: resize the photo as in evaluation: "resize": {json.dumps(resize)}\n'
    assert ran.returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ['"Straße"', "道路\\", "🚲"])
def test_names_that_json_escapes(program, model, photo, tmp_path, name):
    classes = tuple(replace(c, name=f"{name} {i}") for i, c in enumerate(INFO.classes))
    save(model, tmp_path / "x.onnx", metadata(results="semantic", dataset_info=replace(INFO, classes=classes)))
    ran = run(program, tmp_path / "x.onnx", photo, tmp_path / "classes.png")
    assert [line.split("%  ")[1] for line in ran.stdout.splitlines()] == [c.name for c in classes]


@pytest.fixture
def files(exported, model, photo, tmp_path):
    """Good and bad ones, by the names that they have below."""
    write_small_file(tmp_path / "logits.onnx")
    fixed = type(model)()
    fixed.CopyFrom(model)
    height, width = fixed.graph.input[0].type.tensor_type.shape.dim[1:3]
    height.dim_value, width.dim_value = 64, 128
    save(fixed, tmp_path / "fixed.onnx", metadata(results="semantic", size=(64, 128)))
    del fixed.metadata_props[:]
    (tmp_path / "foreign.onnx").write_bytes(fixed.SerializeToString())
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:1000])
    (tmp_path / "cut.ppm").write_bytes(photo.read_bytes()[:-1])
    Image.open(photo).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "image", "output", "said"),
    [
        ("good.onnx", "gone.ppm", "x.png", r"gone\.ppm does not exist"),
        ("good.onnx", "photo.jpg", "x.png", r"photo\.jpg is no binary PPM .* convert it by magick"),
        ("good.onnx", "cut.ppm", "x.png", r"cut\.ppm is cut off"),
        ("gone.onnx", "photo.ppm", "x.png", r"gone\.onnx does not exist"),
        ("cut.onnx", "photo.ppm", "x.png", r"cut\.onnx cannot be opened: it is damaged"),
        ("foreign.onnx", "photo.ppm", "x.png", r"foreign\.onnx was not written by export\.py"),
        ("logits.onnx", "photo.ppm", "x.png", r"logits\.onnx gives no class map: .* results=semantic"),
        ("fixed.onnx", "photo.ppm", "x.png", r"fixed\.onnx takes images of 128 x 64 pixels: resize the photo"),
        ("good.onnx", "photo.ppm", "gone/x.png", r"cannot write .*gone/x\.png"),
    ],
)
def test_mistakes_get_one_line(program, files, given, image, output, said):
    ran = run(program, files / given, files / image, files / output)
    assert ran.returncode == 2
    assert re.fullmatch(rf"error: .*{said}.*\n", ran.stderr), ran.stderr
    assert not (files / output).exists()


def test_without_arguments_it_says_how_to_use_it(program):
    ran = run(program)
    assert ran.returncode == 2
    assert ran.stderr.startswith("usage: segment FILE.onnx PHOTO.ppm CLASSES.png\n")
