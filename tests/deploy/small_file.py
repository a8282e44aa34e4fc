"""A small ONNX file with metadata: three queries that see what is red, green and blue."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

from pem_lightning.deploy.metadata import KEY, Metadata
from pem_lightning.types import ClassInfo, DatasetInfo

INFO = DatasetInfo(
    "toy",
    (
        ClassInfo("car", (220, 20, 60), True, 24),
        ClassInfo("tree", (10, 200, 10), False, 21),
        ClassInfo("Straße", (70, 130, 180), False, 23),
    ),
)
CLASS_LOGITS = np.array([[7, 0, 0, 0], [0, 6, 0, 0], [0, 0, 5, 0]], np.float32)


def metadata(**changes: Any) -> Metadata:
    """Of a file for panoptic segmentation of any size."""
    task = {
        "name": "panoptic",
        "resize_first": True,
        "object_mask_threshold": 0.8,
        "overlap_threshold": 0.5,
        "top_k": 9,
    }
    state = {
        "dataset_info": INFO,
        "task": task,
        "resize": None,
        "size": None,
        "format": "onnx",
        "precision": "float32",
        "deform": "gather",
        "results": None,
        "config": {},
        "overrides": [],
        "step": 1,
        "checkpoint_sha256": "0",
    }
    return Metadata(**(state | changes))


def network(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the file computes: class logits, and for masks how far a channel is above 128, at a quarter of the size."""
    batch, height, width, _ = images.shape
    rows, columns = -height % 32, -width % 32
    padded = np.pad(images.astype(np.float32), ((0, 0), (0, rows), (0, columns), (0, 0)))
    quarters = padded.reshape(batch, (height + rows) // 4, 4, (width + columns) // 4, 4, 3).mean((2, 4))
    return np.repeat(CLASS_LOGITS[None], batch, 0), (quarters.transpose(0, 3, 1, 2) - 128) / 8


def write_small_file(path: Path, **changes: Any) -> Path:
    """Write `network` as ONNX; images must have multiples of 32 pixels, one at once."""
    constant = {"classes": CLASS_LOGITS[None], "middle": np.float32(128), "scale": np.float32(8)}
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["channels"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["channels"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Sub", ["pooled", "middle"], ["difference"]),
        helper.make_node("Div", ["difference", "scale"], ["mask_logits"]),
        helper.make_node("Identity", ["classes"], ["class_logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, "height", "width", 3])],
        [
            helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, [1, 3, 4]),
            helper.make_tensor_value_info("mask_logits", TensorProto.FLOAT, [1, 3, "h", "w"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constant.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, metadata(**changes).to_json()
    save_model(model, path)
    return path
