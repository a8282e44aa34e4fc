"""What the command line makes of export's keys; what it writes is in tests/deploy."""

from pathlib import Path

import numpy as np
import pytest

from pem_lightning.cli.build import build_export, calibration_images
from pem_lightning.deploy.export import ExportOptions
from pem_lightning.types import UserError
from tests.jobs import DRAWN, compose

CHECKPOINT = Path("run/checkpoints/best.ckpt")


def export(*overrides):
    return build_export(compose("export", *overrides), CHECKPOINT)


@pytest.mark.parametrize(
    ("overrides", "format", "output"),
    [
        ([], "onnx", "run/checkpoints/best.onnx"),
        (["format=openvino"], "openvino", "run/checkpoints/best.xml"),
        (["output=out/small.xml"], "openvino", "out/small.xml"),
        (["output=out/small.pt2"], "torch_export", "out/small.pt2"),
        (["output=small"], "onnx", "small.onnx"),
        (["output=v1.2", "format=openvino"], "openvino", "v1.2.xml"),
        (["output=out/"], "onnx", "out/best.onnx"),
    ],
)
def test_format_and_name_of_the_file(overrides, format, output):
    options, path = export(*overrides)
    assert (options.format, path) == (format, Path(output))


def test_options():
    options, _ = export("size=[512,1024]", "precision=float16", "deform=grid_sample", "results=semantic")
    assert options == ExportOptions("onnx", "float16", (512, 1024), "grid_sample", "semantic")
    assert export()[0] == ExportOptions()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=a.xml", "format=onnx"], "output=a.xml does not end in .onnx"),
        (["output=best.ckpt"], "does not end in .onnx"),
        (["output=best.engine"], "does not end in .onnx"),
        (["format=tensorrt"], "choose onnx, openvino"),
        (["size=512"], "size=512: give height and width"),
        (["size=[512]"], "give height and width"),
        (["size=[0,10]"], "give height and width"),
        (["size=[1.5,2]"], "give height and width"),
        (["results=true"], "choose false, panoptic or semantic"),
        (["precision=int8", "format=torch_export"], "precision=int8 is for"),
    ],
)
def test_impossible_values(overrides, message):
    with pytest.raises(UserError, match=message):
        export(*overrides)


def test_calibration_images(tmp_path):
    """Of the training set, evenly spread, as evaluation shows them; no more than there are."""
    drawn = (*DRAWN[1:], f"dataset.root={tmp_path}", "dataset.datamodule.num_train=6", "dataset.datamodule.num_val=1")
    cfg = compose("export", *drawn, "recipe.eval_transform.shortest_edge=32", "recipe.eval_transform.max_size=64")
    images = list(calibration_images(cfg, 3))
    assert [(image.shape, image.dtype) for image in images] == [((1, 32, 64, 3), np.uint8)] * 3
    every = list(calibration_images(cfg, 64))
    assert len(every) == 6
    assert all(np.array_equal(one, every[2 * number]) for number, one in enumerate(images))
    assert next(calibration_images(cfg, 1, (40, 50))).shape == (1, 40, 50, 3)
