from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.data import synthetic
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataset
from pem_lightning.data.street_scene import draw_street
from pem_lightning.data.synthetic import SyntheticDataModule, generate_synthetic
from pem_lightning.data.targets import IGNORE_INDEX, class_map
from pem_lightning.types import UserError

SMALL = {"train": 2, "val": 1, "height": 32, "width": 64}
MANIFEST = "synthetic_manifest.json"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.fixture(scope="module")
def default_scenes(tmp_path_factory) -> CityscapesDataset:
    """The first images of the default training set."""
    root = generate_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train=24, val=1, height=64, width=128)
    return CityscapesDataset(root, "train")


def test_layout_and_counts(tmp_path):
    root = generate_synthetic(tmp_path / "a", **SMALL)
    names = [name for name in contents(root) if name.endswith(".png")]
    assert len(names) == 2 * (2 + 1)
    assert "leftImg8bit/train/synthetic/synthetic_000001_000000_leftImg8bit.png" in names
    assert "gtFine/val/synthetic/synthetic_000000_000000_gtFine_instanceIds.png" in names
    for split, count in (("train", 2), ("val", 1)):
        dataset = CityscapesDataset(root, split)
        assert len(dataset) == count
        assert all(sample.image.shape == (3, 32, 64) for sample in dataset)
    with Image.open(root / "gtFine/val/synthetic/synthetic_000000_000000_gtFine_instanceIds.png") as file:
        assert file.mode == "I;16"


def test_same_seed_same_bytes(tmp_path):
    root = generate_synthetic(tmp_path / "a", **SMALL)
    first, before = contents(root), times(root)
    generate_synthetic(root, **SMALL)
    assert times(root) == before  # not drawn again
    more = contents(generate_synthetic(tmp_path / "b", **{**SMALL, "train": 3}))
    assert all(more[name] == first[name] for name in first if name.endswith(".png"))
    images = [content for name, content in more.items() if "leftImg8bit" in name]
    assert len(set(images)) == 4
    other = contents(generate_synthetic(tmp_path / "c", **SMALL, seed=1))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "leftImg8bit" in name)


@pytest.mark.parametrize("change", [{"train": 1}, {"height": 40}, {"seed": 5}, {}])
def test_changed_parameters_draw_again(tmp_path, change, monkeypatch):
    root = generate_synthetic(tmp_path / "a", **SMALL)
    if not change:
        monkeypatch.setattr(synthetic, "GENERATOR_VERSION", 0)
    generate_synthetic(root, **{**SMALL, **change})
    fresh = generate_synthetic(tmp_path / "b", **{**SMALL, **change})
    assert contents(root) == contents(fresh)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no scratch folder stays


@pytest.mark.parametrize("damage", ["image", "label", "manifest", "garbled manifest", "not done"])
def test_partial_folder_is_drawn_again(tmp_path, damage):
    root = generate_synthetic(tmp_path / "a", **SMALL)
    whole = contents(root)
    if damage == "image":
        next(root.rglob("*_leftImg8bit.png")).unlink()
    elif damage == "label":
        next(root.rglob("*_instanceIds.png")).unlink()
    elif damage == "manifest":
        (root / MANIFEST).unlink()
    elif damage == "garbled manifest":
        (root / MANIFEST).write_text("{")
    else:
        (root / MANIFEST).write_text(json.dumps({**json.loads((root / MANIFEST).read_text()), "done": False}))
    generate_synthetic(root, **SMALL)
    assert contents(root) == whole


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def interrupted(*arguments):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw_street(*arguments)

    monkeypatch.setattr(synthetic, "draw_street", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_synthetic(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_another_process_finishes_meanwhile(tmp_path, monkeypatch):
    root, started, theirs = tmp_path / "a", [], {}

    def slow(*arguments):
        if not started:  # while this process draws its first image, the other one draws everything
            started.append(True)
            generate_synthetic(root, **SMALL)
            theirs.update(times(root))
        return draw_street(*arguments)

    monkeypatch.setattr(synthetic, "draw_street", slow)
    generate_synthetic(root, **SMALL)
    assert times(root) == theirs


def test_another_process_finishes_at_the_last_moment(tmp_path, monkeypatch):
    theirs, root, rename, raced = generate_synthetic(tmp_path / "b", **SMALL), tmp_path / "a", Path.rename, []

    def late(path, target):
        if not raced:
            raced.append(True)
            shutil.copytree(theirs, root)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    generate_synthetic(root, **SMALL)
    assert raced
    assert contents(root) == contents(theirs)


def test_a_folder_that_cannot_be_replaced_is_no_success(tmp_path, monkeypatch):
    root = generate_synthetic(tmp_path / "a", **SMALL)

    def refused(path, target):
        raise PermissionError

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        generate_synthetic(root, **{**SMALL, "seed": 1})


def test_foreign_files_are_never_replaced(tmp_path, write_sample):
    write_sample("aachen_000000_000019", np.full((4, 4), 7, np.uint16))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"did not write.*dataset\.root"):
        generate_synthetic(tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_root_is_a_file(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="did not write"):
        generate_synthetic(tmp_path / "a", **SMALL)


@pytest.mark.parametrize("change", [{"train": 0}, {"val": 0}, {"height": 8}, {"width": 8}, {"seed": -1}])
def test_numbers_out_of_range(tmp_path, change):
    with pytest.raises(UserError, match="dataset=synthetic"):
        generate_synthetic(tmp_path / "a", **{**SMALL, **change})


def test_every_class_crowds_and_void_occur(default_scenes):
    samples = list(default_scenes)
    assert {s.class_id for sample in samples for s in sample.segments} == set(range(CITYSCAPES.num_classes))
    assert any(s.is_crowd for sample in samples for s in sample.segments)
    assert any((class_map(sample) == IGNORE_INDEX).any() for sample in samples)
    things = [sum(s.is_thing and not s.is_crowd for s in sample.segments) for sample in samples]
    assert min(things) >= 2
    assert max(things) <= 12
    # Several of one class in one image, so that instances must be told apart.
    assert any(s.id % 1000 == 1 for sample in samples for s in sample.segments if s.id > 1000)


def test_things_overlap(default_scenes):
    def touch(ids: torch.Tensor) -> bool:
        left, right = ids[:, :-1], ids[:, 1:]
        return bool(((left > 1000) & (right > 1000) & (left != right)).any())

    assert sum(touch(sample.panoptic) for sample in default_scenes) > len(default_scenes) // 3


def test_data_module_runs_alone(tmp_path):
    data = SyntheticDataModule(tmp_path / "a", num_train=4, num_val=2, height=32, width=64, num_workers=0, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.images) == 4
    assert all(max(image.shape[1:]) <= 64 for image in batch.images)
    assert len(data.val_dataloader()) == 2
    assert data.info is CITYSCAPES
