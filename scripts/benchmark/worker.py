"""Runs work of one checkout, wherever that version has the parts; `compare` starts it in a process of its own.

    python scripts/benchmark/worker.py REPOSITORY FOLDER THREADS

FOLDER holds what `compare` wrote. Each line of the input names some work; the answer is a hash of its first result.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT, FOLDER = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
sys.path[0] = str(ROOT)

import pem_lightning  # noqa: E402, I001  # before torch: it sets how memory is taken
import torch  # noqa: E402

Work = Callable[[], Iterable[torch.Tensor]]


def locate(name: str) -> Any:
    """The public class or function of a name, in whatever module it is."""
    for path in sorted((ROOT / "pem_lightning").rglob("*.py")):
        if re.search(rf"^(class|def) {name}\b", path.read_text(), re.MULTILINE):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            return getattr(importlib.import_module(module.removesuffix(".__init__")), name)
    raise SystemExit(f"{ROOT} has no {name}")


def load_network(backbone: str) -> torch.nn.Module:
    network = pem_lightning.build_pem(backbone, num_classes=19)
    network.load_state_dict(torch.load(FOLDER / f"{backbone}.pt"), strict=True)
    return network


def inference(backbone: str, precision: str) -> Work:
    """From normalised pixels to the semantic and the panoptic map."""
    images, thresholds = torch.load(FOLDER / "images.pt")
    size = tuple(images.shape[2:])
    network = locate("OptimizedNetwork")(load_network(backbone).eval(), precision)
    settings = {"object_mask_threshold": thresholds[backbone], "overlap_threshold": 0.0, "resize_first": True}
    postprocess = locate("TaskInference")("panoptic", frozenset(range(11, 19)), **settings)

    def work() -> Iterable[torch.Tensor]:
        result = postprocess(network(images), size, size, with_semantic=True)
        return result.semantic.int(), result.panoptic

    return work


def training(backbone: str) -> Work:
    """A step by the recipe for Cityscapes, from uint8 images to updated weights."""
    images, targets = torch.load(FOLDER / "batch.pt")
    targets = [pem_lightning.Target(*target) for target in targets]
    network = load_network(backbone).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    pad_batch, criterion = locate("pad_batch"), locate("SetCriterion")(19)
    groups = locate("parameter_groups")(network, lr=7e-4, weight_decay=0.05, backbone_lr_multiplier=0.1)
    optimizer = torch.optim.AdamW(groups, fused=True)

    def work() -> Iterable[torch.Tensor]:
        batch, padded = pad_batch(images, targets)
        losses = criterion(network(batch.contiguous(memory_format=torch.channels_last)), padded)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        return [total, *network.parameters()]

    return work


def loader() -> Work:
    """Eight augmented samples with targets, loaded in this process."""
    data = locate("CityscapesDataModule")(FOLDER / "cityscapes", batch_size=4, num_workers=0)
    data.setup("fit")
    batches = data.train_dataloader()
    return lambda: [image for batch in batches for image in batch.images]


KINDS: dict[str, Callable[..., Work]] = {"inference": inference, "training": training, "loader": loader}

if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    torch.set_num_threads(int(sys.argv[3]))
    made: dict[str, tuple[Work, str]] = {}
    for line in sys.stdin:
        torch.manual_seed(0)
        if line in made:
            made[line][0]()
        else:
            kind, *arguments = line.split()
            work = KINDS[kind](*arguments)
            torch.manual_seed(0)
            found = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in work())
            made[line] = work, hashlib.sha256(found).hexdigest()
        print(made[line][1], file=answers, flush=True)
