"""Files of weights in the formats that others publish, filled with random numbers."""

import pickle

import torch

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.models.backbones import build_backbone

CLASSES = ({"name": "a", "color": [1, 2, 3], "is_thing": True, "category_id": 7},)


def random_backbone(name, seed=0):
    """A backbone in which no two tensors are alike, statistics included."""
    torch.manual_seed(seed)
    backbone = build_backbone(name).eval()
    for key, value in backbone.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5) if key.endswith(("weight", "var")) else value.normal_(0, 0.1)
    return backbone


def torchvision_state(backbone):
    """What torchvision and timm publish of a ResNet."""
    return {**backbone.state_dict(), "fc.weight": torch.ones(10, 8), "fc.bias": torch.ones(10)}


def detectron2_names(state):
    """Rename torchvision's ResNet as detectron2's converter does."""

    def rename(key):
        key = key if key.startswith("layer") else f"stem.{key}"
        for number in (1, 2, 3, 4):
            key = key.replace(f"layer{number}.", f"res{number + 1}.").replace(f"bn{number}.", f"conv{number}.norm.")
        return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")

    return {rename(key): value for key, value in state.items()}


def detectron2_pickle(backbone):
    """The content of detectron2's R-50.pkl: arrays, without batch counters."""
    state = detectron2_names(torchvision_state(backbone))
    arrays = {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}


def write_pickle(path, content, numpy_core="numpy._core"):
    """Pickle as Python 2 reads it, naming NumPy's modules as its version 1 or 2 does."""
    text = pickle.dumps(content, protocol=2)
    path.write_bytes(text.replace(b"numpy._core", numpy_core.encode()))
    return path


def stdc_file(backbone, prefix=""):
    """The content of the STDC authors' .tar: every stage a second time, and a classification head."""
    state = dict(backbone.state_dict())
    ends = {"x2": (0, 1), "x4": (1, 2), "x8": (2, 4), "x16": (4, 6), "x32": (6, 8)}
    for stage, (start, end) in ends.items():
        for index in range(start, end):
            inside = f"features.{index}."
            for key in [key for key in backbone.state_dict() if key.startswith(inside)]:
                state[f"{stage}.{index - start}.{key.removeprefix(inside)}"] = state[key]
    state |= {"conv_last.conv.weight": torch.ones(2, 2, 1, 1), "fc.weight": torch.ones(2, 2), "bn.bias": torch.ones(2)}
    state["linear.weight"] = torch.ones(2, 2)
    return {"epoch": 300, "state_dict": {prefix + key: value for key, value in state.items()}}


def write_checkpoint(path, network, overrides=("seed=3",)):
    """One of our own."""
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        "global_step": 12,
        CHECKPOINT_KEY: {
            "config": {"a": 1},
            "overrides": list(overrides),
            "dataset_info": {"name": "toy", "classes": list(CLASSES)},
        },
    }
    torch.save(content, path)
    return path


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
