from __future__ import annotations

import json
import multiprocessing
import os
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


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


class Counting(SegmentationDataset):
    """Counts what is decoded."""

    def __init__(self, source: SegmentationDataset, on_error="stop", delay: float = 0.0) -> None:
        super().__init__(source.info, source.names, on_error=on_error)
        self.source, self.delay, self.decoded = source, delay, []

    def files(self, index):
        return self.source.files(index)

    def read(self, index):
        time.sleep(self.delay)
        self.decoded.append(index)
        return self.source.read(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_holds_the_same_samples(source, tmp_path, num_workers):
    cached = CachedDataset(source, tmp_path / "cache", num_workers)
    assert len(cached) == 4
    assert cached.names == source.names
    assert cached.files(2) == source.files(2)
    for index in range(4):
        assert cached.path(index).is_file()
        assert equal(cached[index], source[index])


def test_what_is_copied_is_not_decoded_again(source, tmp_path):
    first = Counting(source)
    CachedDataset(first, tmp_path / "cache")
    assert first.decoded == [0, 1, 2, 3]
    again = Counting(source)
    cached = CachedDataset(again, tmp_path / "cache")
    assert [cached[i].name for i in range(4)] == source.names
    assert again.decoded == []


def test_transform_and_error_policy_are_taken_over(source, tmp_path):
    source.transform = TrainTransform((16, 16), [20, 30], None)
    cached = CachedDataset(source, tmp_path / "cache")
    torch.manual_seed(3)
    expected = source[3]
    torch.manual_seed(3)
    assert equal(cached[3], expected)
    assert cached.on_error == "stop"


def test_samples_may_be_written_to(source, tmp_path):
    cached = CachedDataset(source, tmp_path / "cache")
    sample = cached[0]
    sample.image.zero_()
    sample.panoptic.fill_(5)
    assert equal(CachedDataset(source, tmp_path / "cache")[0], source[0])


def test_changed_files_are_copied_again(source, tmp_path):
    CachedDataset(Counting(source), tmp_path / "cache")
    image = source.files(2)[0]
    picture = np.array(Image.open(image))
    picture[0, 0] ^= 255
    Image.fromarray(picture).save(image)
    os.utime(source.files(1)[1])
    counting = Counting(source)
    assert equal(CachedDataset(counting, tmp_path / "cache")[2], source[2])
    assert counting.decoded == [1, 2]


def test_a_changed_common_file_outdates_all(source, tmp_path):
    common = tmp_path / "all.json"
    common.write_text("1")
    counting = Counting(source)
    counting.common_files = (common,)
    CachedDataset(counting, tmp_path / "cache")
    CachedDataset(counting, tmp_path / "cache")
    assert counting.decoded == [0, 1, 2, 3]
    common.write_text("10")
    CachedDataset(counting, tmp_path / "cache")
    assert counting.decoded == 2 * [0, 1, 2, 3]


def test_an_interrupted_copying_is_taken_up_again(source, tmp_path):
    class Interrupted(Counting):
        def read(self, index):
            if index == 2:
                raise KeyboardInterrupt
            return super().read(index)

    interrupted = Interrupted(source)
    interrupted.__class__.__qualname__ = Counting.__qualname__  # the same data set at the next start
    with pytest.raises(KeyboardInterrupt):
        CachedDataset(interrupted, tmp_path / "cache")
    assert interrupted.decoded == [0, 1]
    folder = next((tmp_path / "cache").iterdir())
    (folder / ".ulm_000002_000000.sample.123").write_bytes(b"half")  # as a killed process leaves it
    counting = Counting(source)
    cached = CachedDataset(counting, tmp_path / "cache")
    assert counting.decoded == [2, 3]
    assert all(equal(cached[i], source[i]) for i in range(4))
    assert not list(folder.glob("*.123"))


def _start(source: SegmentationDataset, folder: Path, results: multiprocessing.Queue) -> None:
    counting = Counting(source, delay=0.05)
    cached = CachedDataset(counting, folder)
    results.put((len(counting.decoded), all(equal(cached[i], source[i]) for i in range(4))))


def test_processes_that_start_at_once_share_the_work(source, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_start, args=(source, tmp_path / "cache", results)) for _ in range(4)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(decoded for decoded, _ in outcomes) == 4
    assert all(right for _, right in outcomes)


@pytest.mark.parametrize("place", [-1, -500, 60, 20])
def test_damage_is_found_and_named(source, tmp_path, place):
    """In the image, in the map, in the header and in the hash itself."""
    path = CachedDataset(source, tmp_path / "cache").path(0)
    cached = CachedDataset(source, tmp_path / "cache")
    damage(path, place)
    with pytest.raises(UserError, match=r"ulm_000000_000000\.sample is damaged: delete it") as caught:
        cached[0]
    assert "\n" not in str(caught.value)
    path.unlink()
    assert equal(CachedDataset(source, tmp_path / "cache")[0], source[0])


@pytest.mark.parametrize("kept", [0, 10, 48, 200, 3000])
def test_a_truncated_copy_is_made_again(source, tmp_path, kept, caplog):
    cached = CachedDataset(source, tmp_path / "cache")
    path = cached.path(1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged"):
        cached[1]
    assert equal(CachedDataset(source, tmp_path / "cache")[1], source[1])
    assert path.name in caplog.text


def test_an_unreadable_file_stops_with_its_name(source, tmp_path):
    for index in (1, 3):
        source.files(index)[0].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"ulm_000001_000000_leftImg8bit\.png .*\(and 1 more such problem"):
        CachedDataset(source, tmp_path / "cache")


def test_an_unreadable_file_is_skipped_on_request(source, tmp_path, caplog):
    source.on_error = "skip"
    source.files(1)[0].write_bytes(b"no image")
    cached = CachedDataset(source, tmp_path / "cache")
    assert cached[1].name == source.names[2]
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


def test_data_sets_do_not_mix(source, tmp_path, write_sample):
    write_sample("ulm_000000_000000", np.full((9, 9), 7, np.uint16), "val")
    val = CachedDataset(CityscapesDataset(tmp_path, "val"), tmp_path / "cache")
    train = CachedDataset(source, tmp_path / "cache")
    assert val.folder != train.folder
    assert val[0].image.shape == (3, 9, 9)
    assert equal(train[0], source[0])


def test_names_with_folders(source, tmp_path):
    source.names = ["a/b", "a_b", "a%2Fb", "ä b"]
    cached = CachedDataset(source, tmp_path / "cache")
    assert len({cached.path(i) for i in range(4)}) == 4
    assert {cached.path(i).parent for i in range(4)} == {cached.folder}
    assert [cached[i].panoptic.shape[0] for i in range(4)] == [21, 23, 25, 27]


def test_header_is_readable(source, tmp_path):
    path = CachedDataset(source, tmp_path / "cache").path(0)
    content = path.read_bytes()
    header = json.loads(content[48 : content.index(b"}", content.index(b"fingerprint")) + 1])
    assert header["size"] == [21, 33]
    assert len(content) % 64 == (7 * 21 * 33) % 64
