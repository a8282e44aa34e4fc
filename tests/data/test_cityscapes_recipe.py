"""The paper's recipes on a tiny Cityscapes tree of true layout and size."""

import sys

import numpy as np
import pytest
from PIL import Image

from pem_lightning.cli import main as run


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two training and one validation image, 2048x1024, with road, sky, a car and a crowd of persons."""
    root = tmp_path_factory.mktemp("cityscapes")
    rng = np.random.default_rng(0)
    for split, names in (
        ("train", ("aachen_000000_000019", "bremen_000001_000019")),
        ("val", ("frankfurt_000000_000294",)),
    ):
        for name in names:
            city = name.split("_")[0]
            ids = np.full((1024, 2048), 23, np.uint16)
            ids[500:] = 7
            ids[600:800, 300:900] = 26001
            ids[550:750, 1200:1500] = 24
            ids[:20] = 3
            image = rng.integers(0, 256, (64, 128, 3), np.uint8)
            for folder, suffix, array in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_instanceIds", ids)):
                path = root / folder / split / city / f"{name}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(array)
                (picture.resize((2048, 1024)) if folder == "leftImg8bit" else picture).save(path)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_the_papers_recipe_starts(tree, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Two images instead of 32, and one step instead of 90k, are all that is changed.
    arguments = [
        "recipe.global_batch_size=2",
        "trainer.max_steps=1",
        "recipe.val_interval=1",
        "dataset.num_workers=0",
        "trainer=cpu",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", "dataset=cityscapes", f"task={task}", f"dataset.root={tree}", *arguments, "hydra.run.dir=run"],
    )
    run.main("train")
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert ("PQ" in printed) == (task == "panoptic")
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
