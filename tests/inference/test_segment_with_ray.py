"""Images shared out by Ray: the workers and the files here, in this process, and the command with a Ray of its own."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pem_lightning.inference import segment_with_ray as module
from pem_lightning.inference.segment_files import segment_files
from pem_lightning.inference.segment_with_ray import Cluster, segment_with_ray
from pem_lightning.types import UserError
from tests.inference.toy import INFO, Objects, predictor
from tests.jobs import ROOT, call

FORMATS = ["coco", "coco_polygons", "cvat", "labelme"]


def write_images(folder, count=5, size=(96, 64)):
    folder.mkdir(parents=True)
    for i in range(count):
        small = np.random.default_rng(i).integers(0, 4, (4, 6, 1)).astype(np.uint8) * 60
        image = Image.fromarray(small.repeat(3, axis=2)).resize(size, Image.Resampling.NEAREST)
        image.save(folder / f"image_{i:02d}.png")
    return folder


def content(folder):
    """The results in a folder, without what only launcher=ray writes."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name not in (".finished.jsonl", "failed.txt")}


class Here:
    """Stands for Ray: the workers run in this process, one block after the other; counts the images they get."""

    def __init__(self, block=2):
        self.block, self.given = block, []

    def rows(self, make, writer, addresses, cluster):
        self.given += addresses
        worker = module._Worker(make, writer, threads=1)
        for start in range(0, len(addresses), self.block):
            columns = worker({"address": np.array(addresses[start : start + self.block])})
            yield from ({key: columns[key][i] for key in columns} for i in range(len(columns["name"])))


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(module, "_check_installed", lambda: None)
    monkeypatch.setattr(module, "_connected", lambda address: nullcontext())
    monkeypatch.setattr(module, "_rows", (stand_in := Here()).rows)
    return stand_in


def segment(source, output, task="panoptic", **options):
    segment_with_ray(lambda: predictor(task, Objects()), source, output, task, INFO, **options)


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
@pytest.mark.parametrize("save", [None, "overlays"])
def test_the_files_are_those_of_one_process(here, tmp_path, task, save):
    images = write_images(tmp_path / "in")
    segment_files(predictor(task, Objects()), images, tmp_path / "plain", save=save, formats=FORMATS)
    segment(images, tmp_path / "ray", task, save=save, formats=FORMATS)
    assert content(tmp_path / "ray") == content(tmp_path / "plain")
    assert {"coco.json", "cvat.xml", "image_00_overlay.png"} <= set(content(tmp_path / "ray"))


def test_addresses_stand_for_folders(here, tmp_path):
    images = write_images(tmp_path / "in")
    memory = fsspec.filesystem("memory")
    memory.put(str(images), "/bucket/in", recursive=True)
    segment_files(predictor(model=Objects()), images, tmp_path / "out", formats=FORMATS)
    segment("memory://bucket/in/*.png", "memory://bucket/out", formats=FORMATS)
    assert len(here.given) == 5
    memory.get("/bucket/out", str(tmp_path / "copy"), recursive=True)
    assert content(tmp_path / "copy") == content(tmp_path / "out")  # LabelMe's way to the image included
    segment(images.as_uri(), "memory://bucket/elsewhere", formats=["labelme"])
    assert str(images) in memory.cat_file("/bucket/elsewhere/labelme/image_00.json").decode()
    segment("memory://bucket/in", "memory://bucket/out", formats=FORMATS)
    assert len(here.given) == 10


class TestSecondStart:
    def test_does_what_is_missing(self, here, tmp_path, capsys):
        images, output = write_images(tmp_path / "in"), tmp_path / "out"
        segment(images, output)
        first = content(output)
        (output / "image_01_overlay.png").unlink()
        (output / "panoptic" / "image_03.png").write_bytes(b"cut")
        here.given.clear()
        segment(images, output)
        assert [Path(address).stem for address in here.given] == ["image_01", "image_03"]
        assert "5 of 5 images segmented (3 of them before)" in capsys.readouterr().out
        assert content(output) == first

    def test_with_other_settings_does_all(self, here, tmp_path):
        images, output = write_images(tmp_path / "in"), tmp_path / "out"
        for settings, count in (("a", 5), ("a", 0), ("b", 5), ("a", 5)):
            here.given.clear()
            segment(images, output, settings=settings)
            assert len(here.given) == count

    def test_goes_on_after_the_first_was_cut_off(self, here, tmp_path, monkeypatch):
        images, output = write_images(tmp_path / "in"), tmp_path / "out"
        rows = here.rows

        def cut(*arguments):
            for i, row in enumerate(rows(*arguments)):
                if i == 3:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(module, "_rows", cut)
        with pytest.raises(KeyboardInterrupt):
            segment(images, output)
        monkeypatch.setattr(module, "_rows", rows)
        here.given.clear()
        segment(images, output)
        assert len(here.given) == 1  # the block of the fourth image had been written
        segment(images, tmp_path / "whole")
        assert content(output) == content(tmp_path / "whole")


def test_broken_images_are_listed_and_the_others_done(here, tmp_path, capsys):
    images, output = write_images(tmp_path / "in"), tmp_path / "out"
    whole = (broken := images / "image_02.png").read_bytes()
    broken.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"1 of 5 files .*: repair or remove those in .*failed\.txt"):
        segment(images, output)
    assert (output / "failed.txt").read_text().startswith(f"{broken}\tcannot read {broken}")
    assert "4 of 5 images segmented" in (printed := capsys.readouterr()).out
    assert printed.err.count("skipped: ") == 1
    broken.write_bytes(whole)
    here.given.clear()
    segment(images, output)
    assert here.given == [str(broken)]
    assert not (output / "failed.txt").exists()


def test_images_that_kill_their_workers_are_given_up(here, tmp_path, monkeypatch, capsys):
    images, output = write_images(tmp_path / "in", count=2), tmp_path / "out"
    (output / ".finished").mkdir(parents=True)

    def dies(self, photos):
        raise SystemExit

    given_up = module._Writer(str(output), "panoptic", INFO, "all", None, "")
    addresses = {"address": np.array([str(path) for path in sorted(images.iterdir())])}
    with monkeypatch.context() as patch:
        patch.setattr(module.Predictor, "stream", dies)
        for _ in range(module._DEATHS):
            with pytest.raises(SystemExit):
                module._Worker(lambda: predictor(model=Objects()), given_up, 1)(addresses)
    rows = module._Worker(lambda: predictor(model=Objects()), given_up, 1)(addresses)
    assert rows["kind"] == ["failed", "failed"]
    assert "3 workers died at it or its neighbours" in rows["text"][0]
    segment(images, output)  # a new start tries again
    assert "2 of 2 images segmented," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("gone", {}, "gone does not exist"),
        ("clip.mp4", {}, r"launcher=ray is for images, and .*clip.mp4 is a video"),
        ("in", {"save": "mask"}, "no save=mask"),
        ("in", {"formats": "coca"}, r"no formats=coca \(did you mean coco"),
        ("in", {"cluster": Cluster(workers=0)}, "workers=0: choose 1 or more"),
        ("memory://nowhere", {}, "memory://nowhere does not exist"),
        ("nothing://in", {}, "cannot open nothing://in .*check the address"),
    ],
)
def test_mistakes_are_said_in_one_line(here, tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", count=1)
    (tmp_path / "clip.mp4").write_bytes(b"junk")
    with pytest.raises(UserError, match=message) as error:
        segment(source, "out", **options)
    assert "\n" not in str(error.value)
    assert not here.given


def test_what_a_worker_cannot_do_stops_the_run(here, tmp_path):
    images = write_images(tmp_path / "in", count=1)

    def make():
        return predictor(classes=["cat"])

    with pytest.raises(UserError, match="there is no class cat"):
        segment_with_ray(make, images, tmp_path / "out", "panoptic", INFO)


def test_without_ray_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    write_images(tmp_path / "in", count=1)
    assert call("predict", "checkpoint=camvid", "input=in", "launcher=ray") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: launcher=ray needs the package ray")
    assert "requirements-ray.txt" in line or "[ray]" in line


@pytest.mark.slow
class TestRay:
    """The command, as users start it."""

    ARGUMENTS = ("checkpoint=camvid", "task=panoptic", "recipe.eval_transform.shortest_edge=192", "input=in")
    RAY = ("launcher=ray", "launcher.workers=2", "launcher.address=local", "output=ray")

    @pytest.fixture
    def images(self, tmp_path, monkeypatch):
        pytest.importorskip("ray")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return write_images(tmp_path / "in", count=40, size=(240, 192))

    def start(self, *arguments):
        command = [sys.executable, str(ROOT / "predict.py"), *self.ARGUMENTS, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, start_new_session=True, **streams)

    def wait_for(self, pattern, process):
        end = time.monotonic() + 300
        while not list(Path("ray").glob(pattern)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def workers(self, process):
        psutil = pytest.importorskip("psutil")
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if child.cmdline()[:1] and "_Worker" in child.cmdline()[0]]

    def test_a_killed_worker_costs_what_it_had_not_written(self, images, tmp_path):
        (images / "image_07.png").write_bytes(b"junk")
        assert self.start("output=plain").wait() == 2
        process = self.start(*self.RAY)
        self.wait_for("panoptic/*.png", process)
        killed = self.workers(process)[0]
        killed.kill()
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, err
        assert "39 of 40 images segmented, results in ray" in out
        assert content(tmp_path / "ray") == content(tmp_path / "plain")
        assert "image_07.png" in (tmp_path / "ray" / "failed.txt").read_text()
        assert "Traceback" not in err
        assert len(err.splitlines()) < 10

    def test_ctrl_c_ends_it_in_order_and_a_second_start_goes_on(self, images, tmp_path):
        process = self.start(*self.RAY)
        self.wait_for("panoptic/*.png", process)
        workers = self.workers(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert workers
        # At once in nearly all trials; once in 15 a worker was still there when the command had returned.
        _, left = pytest.importorskip("psutil").wait_procs(workers, timeout=10)
        assert not left
        done = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "ray" / "panoptic").glob("*.png")}
        assert 0 < len(done) < 40
        again = self.start(*self.RAY)
        out, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
        assert "40 of 40 images segmented (" in out
        kept = [n for n, written in done.items() if (tmp_path / f"ray/panoptic/{n}.png").stat().st_mtime_ns == written]
        assert len(kept) >= len(done) - 2  # of one image for each worker the record may be missing
        assert len(content(tmp_path / "ray")) == 81
