import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pem_lightning.data.transforms import EvalTransform
from pem_lightning.deploy import Runtime, __main__
from pem_lightning.deploy.sessions import ONNXSession
from pem_lightning.inference import regions
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor
from pem_lightning.types import Predictions, UserError
from tests.deploy.small_file import INFO, network, write_small_file
from tests.test_package import HIDDEN, run_hidden


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_small_file(tmp_path_factory.mktemp("file") / "small.onnx")


@pytest.fixture(scope="module")
def photo():
    """Soft spots of red, green and blue."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((128, 64), Image.Resampling.BICUBIC))


def test_onnx_runs_on_a_gpu_of_nvidia_or_the_cpu(path):
    """CoreML, which ONNX Runtime takes by itself on a Mac, computes in float16."""
    opened = []

    def make_session(*arguments, providers):
        opened.append(providers)
        return SimpleNamespace(
            get_providers=lambda: providers, get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={})
        )

    library = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=make_session)
    session = ONNXSession.__new__(ONNXSession)
    session.path = path
    for available in (["CoreML", "CPU"], ["CUDA", "CPU"]):
        library.get_available_providers = lambda names=available: [f"{name}ExecutionProvider" for name in names]
        session._open(library, None, None, None)
    assert opened == [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]]
    assert session.device == "cuda"


class Network(nn.Module):
    """`network` for normalised images, as `Predictor` runs it."""

    def forward(self, images):
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        pixels = (images.permute(0, 2, 3, 1) * std + mean).round().numpy().astype(np.uint8)
        return Predictions(*(torch.from_numpy(output) for output in network(pixels)))


def predictor(task, resize=None, **options):
    thresholds = {"resize_first": True, "object_mask_threshold": 0.8, "overlap_threshold": 0.5, "top_k": 9}
    inference = TaskInference(task, INFO.thing_classes, **thresholds)
    return Predictor.from_parts(Network(), INFO, inference, device="cpu", resize=resize, **options)


TASKS = ("panoptic", "semantic", "instance")


class TestSameAsPredictor:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("options", [{}, {"classes": ["car", "Straße"], "score_threshold": 0.5}])
    def test_results_and_files(self, tmp_path, path, photo, task, options):
        results = Runtime(path, task=task, **options)(photo, "x"), predictor(task, **options)(photo, "x")
        found, expected = results
        assert (found.name, found.info, repr(found)) == ("x", INFO, repr(expected))
        assert found.segments == expected.segments or [s[:4] for s in found.segments] == [
            s[:4] for s in expected.segments
        ]
        assert (found.instances is None) == (expected.instances is None)
        for one, other in zip(found.instances or (), expected.instances or (), strict=True):
            assert (one.mask == other.mask.numpy()).all()
            assert one[1:3] == other[1:3]
            assert one.score == pytest.approx(other.score)
        files = [r.save(tmp_path / str(i)) for i, r in enumerate(results)]
        assert [f.name for f in files[0]] == [f.name for f in files[1]]
        for one, other in zip(*files, strict=True):
            if one.suffix == ".png":
                assert one.read_bytes() == other.read_bytes()
        assert type(found.panoptic if task == "panoptic" else found.image) is np.ndarray

    @pytest.mark.parametrize("size", [(64, 128), (60, 100), (97, 40), (300, 500)])
    def test_the_size_of_evaluation(self, tmp_path, photo, size):
        path = write_small_file(tmp_path / "x.onnx", resize={"shortest_edge": 64, "max_size": 4096})
        image = np.asarray(Image.fromarray(photo).resize(size[::-1]))
        runtime = Runtime(path)
        runtime.session.run = network  # pads
        found, expected = runtime(image), predictor("panoptic", EvalTransform(64, 4096))(image)
        assert found.panoptic.shape == size
        assert (found.panoptic == expected.panoptic.numpy()).all()


class TestWithoutOtherPackages:
    @pytest.mark.parametrize("task", TASKS)
    def test_results_and_files(self, tmp_path, path, photo, task):
        """In a process where PyTorch, OpenCV and all the others cannot be imported."""
        Image.fromarray(photo).save(tmp_path / "x.png")
        run_hidden(
            f"from pem_lightning.deploy import Runtime; Runtime({str(path)!r}, task={task!r})"
            f"({str(tmp_path / 'x.png')!r}).save({str(tmp_path / 'hidden')!r})"
        )
        for expected in Runtime(path, task=task)(photo, "x").save(tmp_path / "full"):
            found = tmp_path / "hidden" / expected.name
            if expected.name == "x_overlay.png":  # names may sit elsewhere, and the street has no ß
                continue
            if expected.suffix == ".png":
                assert (np.asarray(Image.open(found)) == np.asarray(Image.open(expected))).all()
            else:
                assert json.loads(found.read_text()) == json.loads(expected.read_text())
        assert Image.open(tmp_path / "hidden" / "x_overlay.png").size == (128, 64)

    @pytest.mark.parametrize("task", TASKS)
    def test_overlays_but_for_names(self, path, photo, task, monkeypatch):
        result = Runtime(path, task=task)(photo)
        expected = result.overlay(draw_names=False)
        monkeypatch.setattr(regions, "opencv", lambda: None)
        assert (result.overlay(draw_names=False) == expected).all()
        assert result.overlay().shape == expected.shape

    def test_nothing_else_is_imported_where_it_is_installed(self, path):
        code = (
            f"import sys; from pem_lightning.deploy import Runtime; Runtime({str(path)!r}); "
            "print([m for m in ('torch', 'jaxtyping', 'cv2', 'scipy', 'pycocotools', 'omegaconf', 'matplotlib') "
            "if m in sys.modules])"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert ran.stdout == "[]\n"


class TestImages:
    def test_of_every_kind(self, tmp_path, path, photo):
        image = Image.fromarray(photo)
        image.save(tmp_path / "file.png")
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        image.rotate(180).save(tmp_path / "turned.png", exif=exif)
        runtime = Runtime(path)
        expected = runtime(photo)
        given = [
            tmp_path / "file.png",
            str(tmp_path / "file.png"),
            image,
            torch.from_numpy(photo.copy()).permute(2, 0, 1),
        ]
        results = runtime([*given, tmp_path / "turned.png"])
        assert [r.name for r in results] == ["file", "file", "image", "image", "turned"]
        for result in results:
            assert (result.panoptic == expected.panoptic).all()
        assert runtime([photo], ["a"])[0].name == "a"

    def test_that_are_none_get_one_line(self, tmp_path, path):
        (tmp_path / "x.png").write_bytes(b"no image")
        for source, said in ((tmp_path / "x.png", "x.png"), (tmp_path / "y.png", "does not exist"), (None, "must be")):
            with pytest.raises(UserError, match=said):
                Runtime(path)(source)

    def test_too_large_for_the_memory(self, path, photo, monkeypatch):
        def fails(*_):
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

        monkeypatch.setattr(ONNXSession, "run", fails)
        with pytest.raises(UserError, match="128 x 64 pixels needs more memory than there is"):
            Runtime(path)(photo)


class TestOptions:
    def test_thresholds(self, path, photo):
        assert len(Runtime(path)(photo).segments) == 3
        assert Runtime(path, object_mask_threshold=0.9999)(photo).segments == ()
        assert Runtime(path, overlap_threshold=1.1)(photo).segments == ()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"task": "panotic"}, "unknown task 'panotic'"),
            ({"classes": ["caar"]}, r"there is no class caar \(did you mean car\?\)"),
            ({"threads": 0}, "threads=0: choose 1 or more"),
            ({"precision": "float8"}, "precision=float8: choose float32 or bfloat16"),
        ],
    )
    def test_wrong_ones_are_named(self, path, options, said):
        with pytest.raises(UserError, match=said):
            Runtime(path, **options)

    def test_files_for_other_languages_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"x\.onnx has its results merged in the graph.* results=false"):
            Runtime(write_small_file(tmp_path / "x.onnx", results="panoptic"))


def run_command(*arguments, cwd, hidden=True):
    code = (HIDDEN if hidden else "") + (
        "import runpy, sys; sys.argv[0] = 'pem-run'; runpy.run_module('pem_lightning.deploy', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


class TestCommand:
    def test_segments_images(self, tmp_path, path, photo):
        for name in ("a.png", "b.png"):
            Image.fromarray(photo).save(tmp_path / name)
        ran = run_command(path, "a.png", "b.png", "--output", "out", cwd=tmp_path)
        assert (ran.returncode, ran.stdout) == (0, "2 of 2 images segmented, results in out\n")
        written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
        assert written == ["a_overlay.png", "b_overlay.png", "panoptic.json", "panoptic/a.png", "panoptic/b.png"]

    def test_a_broken_one_is_skipped(self, tmp_path, path, photo, capsys, monkeypatch):
        Image.fromarray(photo).save(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"1 of 2 files could not be read"):
            __main__.run([str(path), str(tmp_path), "--output", str(tmp_path / "out"), "--task", "semantic"])
        assert (tmp_path / "out" / "a_semantic.png").exists()
        assert "skipped: cannot read" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["model.onnx"], "images"),
            (["model.onnx", "x.png", "--treads", "1"], "unrecognized arguments: --treads 1"),
            (["model.onnx", "gone.png"], "gone.png does not exist"),
            (["model.onnx", "x.png"], "model.onnx does not exist"),
            (["x.png", "x.png"], "x.png is no exported file"),
            (["model.onnx", "x.png", "--save", "mask"], "there is no --save mask (did you mean masks?)"),
            (["model.onnx", "x.png", "x.png"], "2 files are named x"),
            (["model.onnx", "x.png", "--threads", "two"], "invalid int value: 'two'"),
        ],
    )
    def test_mistakes_get_one_line(self, tmp_path, photo, arguments, said, monkeypatch, capsys):
        Image.fromarray(photo).save(tmp_path / "x.png")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pem-run", *arguments])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert said in printed.err
        assert len(printed.err.splitlines()) == 1

    def test_help_fits_on_a_screen(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["pem-run"])
        monkeypatch.setattr(sys, "stdout", printed := io.StringIO())
        __main__.main()
        lines = printed.getvalue().splitlines()
        assert 10 < len(lines) <= 40

    @pytest.mark.slow
    def test_ctrl_c_ends_quietly(self, tmp_path, path, photo):
        for i in range(400):
            Image.fromarray(photo).resize((640, 320)).save(tmp_path / f"{i}.png")
        command = [sys.executable, "-m", "pem_lightning.deploy", str(path), str(tmp_path), "--output", "out"]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        listen = partial(
            signal.signal, signal.SIGINT, signal.default_int_handler
        )  # a shell's background jobs ignore it
        options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, preexec_fn=listen, **options)
        while not (tmp_path / "out" / "0_overlay.png").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
        assert (process.returncode, printed) == (130, "")
        assert not list(tmp_path.rglob("*.tmp"))
