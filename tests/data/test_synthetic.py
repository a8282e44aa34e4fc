from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data import synthetic
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataset
from pem_lightning.data.street_scene import draw_street
from pem_lightning.data.synthetic import SyntheticDataModule, generate_synthetic
from pem_lightning.types import IGNORE_INDEX, UserError

SMALL = {"train": 1, "val": 1, "height": 32, "width": 64}
MANIFEST = "synthetic_manifest.json"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.fixture(scope="module")
def default_scenes(tmp_path_factory) -> CityscapesDataset:
    """The first images of the default training set."""
    root = generate_synthetic(tmp_path_factory.mktemp("data") / "synthetic", train=24, val=1, height=32, width=64)
    return CityscapesDataset(root, "train")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    return generate_synthetic(tmp_path_factory.mktemp("small") / "fresh", **SMALL)


def test_layout_and_counts(fresh):
    root = fresh
    names = [name for name in contents(root) if name.endswith(".png")]
    assert len(names) == 2 * (1 + 1)
    assert "leftImg8bit/train/synthetic/synthetic_000000_000000_leftImg8bit.png" in names
    assert "gtFine/val/synthetic/synthetic_000000_000000_gtFine_instanceIds.png" in names
    for split in ("train", "val"):
        (sample,) = CityscapesDataset(root, split)
        assert sample.image.shape == (3, 32, 64)
    with Image.open(root / "gtFine/val/synthetic/synthetic_000000_000000_gtFine_instanceIds.png") as file:
        assert file.mode == "I;16"


def test_same_seed_same_bytes(tmp_path, fresh):
    first, before = contents(fresh), times(fresh)
    generate_synthetic(fresh, **SMALL)
    assert times(fresh) == before  # not drawn again
    more = contents(generate_synthetic(tmp_path / "b", **{**SMALL, "train": 2}))
    assert all(more[name] == first[name] for name in first if name.endswith(".png"))
    images = [content for name, content in more.items() if "leftImg8bit" in name]
    assert len(set(images)) == 3
    other = contents(generate_synthetic(tmp_path / "c", **SMALL, seed=1))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "leftImg8bit" in name)


@pytest.mark.parametrize("what", ["seed", "version", "image", "label", "manifest", "garbled manifest"])
def test_other_parameters_and_partial_folders_are_drawn_again(tmp_path, fresh, what, monkeypatch):
    root = shutil.copytree(fresh, tmp_path / "a")
    if what == "seed":
        assert contents(generate_synthetic(root, **SMALL, seed=5)) != contents(fresh)
    elif what == "version":
        monkeypatch.setattr(synthetic, "GENERATOR_VERSION", 0)
        generate_synthetic(root, **SMALL)
        monkeypatch.undo()
    elif what in ("image", "label"):
        next(root.rglob("*_leftImg8bit.png" if what == "image" else "*_instanceIds.png")).unlink()
    elif what == "manifest":
        (root / MANIFEST).unlink()
    else:
        (root / MANIFEST).write_text("{")
    generate_synthetic(root, **SMALL)
    assert contents(root) == contents(fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no scratch folder stays


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


def test_another_process_finishes_at_the_last_moment(tmp_path, fresh, monkeypatch):
    root, rename, raced = tmp_path / "a", Path.rename, []

    def late(path, target):
        if not raced:
            raced.append(True)
            shutil.copytree(fresh, root)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    generate_synthetic(root, **SMALL)
    assert raced
    assert contents(root) == contents(fresh)


def test_a_folder_that_cannot_be_replaced_is_no_success(fresh, monkeypatch):
    def refused(path, target):
        raise PermissionError

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        generate_synthetic(fresh, **{**SMALL, "seed": 1})


def test_foreign_files_are_never_replaced(tmp_path, write_sample):
    write_sample("aachen_000000_000019", np.full((4, 4), 7, np.uint16))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"did not write.*dataset\.root"):
        generate_synthetic(tmp_path, **SMALL)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="did not write"):
        generate_synthetic(next(tmp_path.rglob("*.png")), **SMALL)


@pytest.mark.parametrize("change", [{"train": 0}, {"val": 0}, {"height": 8}, {"width": 8}, {"seed": -1}])
def test_numbers_out_of_range(tmp_path, change):
    with pytest.raises(UserError, match="dataset=synthetic"):
        generate_synthetic(tmp_path / "a", **{**SMALL, **change})


def test_every_class_crowds_and_void_occur(default_scenes):
    samples = list(default_scenes)
    assert {s.class_id for sample in samples for s in sample.segments} == set(range(CITYSCAPES.num_classes))
    assert any(s.is_crowd for sample in samples for s in sample.segments)
    assert any((sample.class_map() == IGNORE_INDEX).any() for sample in samples)
    things = [sum(s.is_thing and not s.is_crowd for s in sample.segments) for sample in samples]
    assert min(things) >= 2
    assert max(things) <= 12
    # Several of one class in one image, so that instances must be told apart.
    assert any(s.id % 1000 == 1 for sample in samples for s in sample.segments if s.id > 1000)


def test_data_module_runs_alone(tmp_path):
    data = SyntheticDataModule(tmp_path / "a", num_train=2, num_val=1, height=32, width=64, num_workers=0, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.images) == 2
    assert all(max(image.shape[1:]) <= 64 for image in batch.images)
    assert len(data.val_dataloader()) == 1
    assert (data.info.name, data.info.classes) == ("synthetic", CITYSCAPES.classes)
