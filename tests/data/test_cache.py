from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.data import cache
from pem_lightning.data.cache import CachedDataset
from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.data.transforms import TrainTransform
from pem_lightning.types import Sample, UserError


@pytest.fixture
def source(tmp_path, write_sample):
    """Four images of odd sizes: one without annotation, one of a single class, one with the largest ids."""
    rng = np.random.default_rng(0)
    for i, values in enumerate(([0, 7, 24, 24000], [0], [11], [26000, 33999])):
        ids = rng.choice(np.array(values, np.uint16), (21 + 2 * i, 33))
        write_sample(f"ulm_{i:06d}_000000", ids, image=rng.integers(0, 256, (*ids.shape, 3), np.uint8))
    return CityscapesDataset(tmp_path, "train")


def equal(a: Sample, b: Sample) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.panoptic, b.panoptic) and a[2:] == b[2:]


class Counting(SegmentationDataset):
    """Counts what is decoded; may be interrupted at an item."""

    def __init__(self, source: SegmentationDataset, delay: float = 0.0, interrupted_at: int | None = None) -> None:
        super().__init__(source.info, {name: source.files(i) for i, name in enumerate(source.names)})
        self.source, self.delay, self.interrupted_at, self.decoded = source, delay, interrupted_at, []

    def read(self, index):
        time.sleep(self.delay)
        if index == self.interrupted_at:
            raise KeyboardInterrupt
        self.decoded.append(index)
        return self.source.read(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_holds_the_same_samples(source, tmp_path, num_workers):
    cached = CachedDataset(source, tmp_path / "cache", num_workers)
    assert cached.names == source.names
    assert cached.files(2) == source.files(2)
    for index in range(4):
        assert equal(cached[index], source[index])
    image, ids, _ = cached.paths(0)
    assert np.array_equal(np.load(image), source[0].image.permute(1, 2, 0))
    assert np.array_equal(np.load(ids), source[0].panoptic)
    sample = cached[0]
    sample.image.zero_()  # in memory only
    sample.panoptic.fill_(5)
    assert equal(cached[0], source[0])
    assert equal(pickle.loads(pickle.dumps(cached))[3], source[3])  # as processes that are not forked get it


def test_transform_and_error_policy_are_taken_over(source, tmp_path):
    source.transform = TrainTransform((16, 16), [20, 30], None)
    cached = CachedDataset(source, tmp_path / "cache")
    torch.manual_seed(3)
    expected = source[3]
    torch.manual_seed(3)
    assert equal(cached[3], expected)
    assert cached.on_error == "stop"


def test_changed_files_are_copied_again(source, tmp_path):
    common = tmp_path / "all.json"
    common.write_text("1")

    def decoded():
        counting = Counting(source)
        counting.common_files = (common,)
        cached = CachedDataset(counting, tmp_path / "cache")
        assert all(equal(cached[i], source[i]) for i in range(4))
        return counting.decoded

    assert decoded() == [0, 1, 2, 3]
    image = source.files(2)[0]
    picture = np.array(Image.open(image))
    picture[0, 0] ^= 255
    Image.fromarray(picture).save(image)
    os.utime(source.files(1)[1])
    assert decoded() == [1, 2]
    common.write_text("10")
    assert decoded() == [0, 1, 2, 3]
    assert decoded() == []


def test_an_interrupted_copying_is_taken_up_again(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        CachedDataset(Counting(source, interrupted_at=2), tmp_path / "cache")
    folder = next((tmp_path / "cache").iterdir())
    (folder / ".ulm_000002_000000.ids.npy.123.tmp").write_bytes(b"half")  # as a killed process leaves it
    counting = Counting(source)
    cached = CachedDataset(counting, tmp_path / "cache")
    assert counting.decoded == [2, 3]
    assert all(equal(cached[i], source[i]) for i in range(4))
    assert not list(folder.glob("*.tmp"))


def _start(source: SegmentationDataset, folder: Path, results: multiprocessing.Queue) -> None:
    counting = Counting(source, delay=0.05)
    cached = CachedDataset(counting, folder)
    results.put((len(counting.decoded), all(equal(cached[i], source[i]) for i in range(4))))


def test_processes_that_start_at_once_share_the_work(source, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_start, args=(source, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(decoded for decoded, _ in outcomes) == 4
    assert all(right for _, right in outcomes)


@pytest.mark.parametrize(("file", "place"), [(0, -1), (0, 12), (1, -1), (1, 70), (2, 5), (2, -3)])
def test_damage_is_found_and_named(source, tmp_path, file, place):
    """In the arrays, in their headers, and in the JSON."""
    cached = CachedDataset(source, tmp_path / "cache")
    path = cached.paths(0)[file]
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ulm_000000_000000\.json or its arrays are damaged: delete it") as caught:
        cached[0]
    assert "\n" not in str(caught.value)
    cached.paths(0)[2].unlink()
    assert equal(CachedDataset(source, tmp_path / "cache")[0], source[0])


@pytest.mark.parametrize(("file", "kept"), [(0, 0), (0, 60), (1, 500), (2, 0), (2, 50)])
def test_a_truncated_copy_is_made_again(source, tmp_path, file, kept, caplog):
    cached = CachedDataset(source, tmp_path / "cache")
    assert equal(cached[1], source[1])
    path = cached.paths(1)[file]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged"):
        cached[1]
    assert equal(CachedDataset(source, tmp_path / "cache")[1], source[1])
    assert cached.paths(1)[2].name in caplog.text


def test_an_unreadable_file_stops_or_is_skipped(source, tmp_path, caplog):
    for index in (1, 3):
        source.files(index)[0].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"ulm_000001_000000_leftImg8bit\.png .*\(and 1 more such problem"):
        CachedDataset(source, tmp_path / "cache")
    source.on_error = "skip"
    assert CachedDataset(source, tmp_path / "cache")[1].name == source.names[2]
    assert "ulm_000001_000000_leftImg8bit.png" in caplog.text


def test_a_full_disk_is_noticed_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    counting = Counting(source)
    with pytest.raises(UserError, match=r"dataset\.cache=.*cache needs 0\.0 GB, of which its disk has 0\.0 GB free"):
        CachedDataset(counting, tmp_path / "cache")
    assert counting.decoded == []


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to dataset\.cache=.*file"):
        CachedDataset(source, tmp_path / "file")


def test_data_sets_and_names_do_not_mix(source, tmp_path, write_sample):
    write_sample("ulm_000000_000000", np.full((9, 9), 7, np.uint16), "val")
    val = CachedDataset(CityscapesDataset(tmp_path, "val"), tmp_path / "cache")
    source.names = ["a/b", "a_b", "a%2Fb", "ä b"]
    train = CachedDataset(source, tmp_path / "cache")
    assert val.folder != train.folder
    assert val[0].image.shape == (3, 9, 9)
    paths = {path for i in range(4) for path in train.paths(i)}
    assert len(paths) == 12
    assert {path.parent for path in paths} == {train.folder}
    assert [train[i].panoptic.shape[0] for i in range(4)] == [21, 23, 25, 27]
