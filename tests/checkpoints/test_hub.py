import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pem_lightning.checkpoints import CHECKPOINT_KEY, read_checkpoint
from pem_lightning.checkpoints.checkpoint import slim_content
from pem_lightning.checkpoints.hub import load_pretrained, save_pretrained
from pem_lightning.checkpoints.pretrained import read_weights
from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.inference.predictor import Predictor
from pem_lightning.metrics.evaluator import Evaluator, to_plain
from pem_lightning.types import Result, Sample, Segment, UserError
from tests.deploy.tiny import tiny_checkpoint
from tests.inference.toy import predictor as toy_predictor
from tests.jobs import call

TRUST = ["tests"]
"""The network has a backbone of the tests."""
LOAD = "load_pretrained('me/streets')"
PUSH = "push_to_hub('camvid', 'me/streets')"


def evaluated():
    """The evaluation of one image whose left half is road, which was found, and whose right half is a missed car."""
    ids = torch.ones(8, 8, dtype=torch.int32)
    ids[:, 4:] = 2
    sample = Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), ids, (Segment(1, 0, False), Segment(2, 13, True)), "a")
    evaluator = Evaluator(CITYSCAPES, "panoptic")
    found = (Segment(1, 0, False, score=0.9),)
    semantic = torch.zeros(8, 8, dtype=torch.int32)
    evaluator.update(Result(semantic, torch.where(ids == 1, ids, 0), found), sample)
    return evaluator.compute()


@pytest.fixture
def run(tmp_path):
    """A run's best.ckpt, as a training in a folder of somebody's would leave it."""
    folder = tmp_path / "outputs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = tiny_checkpoint(folder)
    config = {
        **checkpoint.config,
        "dataset": {"name": "cityscapes", "root": "/home/me/data", "cache": "cache", "datamodule": {"root": "/x"}},
        "backbone": {"name": "tiny"},
        "weights": "old/secret_project/best.ckpt",
        "output_dir": str(folder),
        "logger": {"wandb": {"entity": "me_and_my_account"}},
    }
    resize = {"_target_": "pem_lightning.data.EvalTransform", "shortest_edge": 64}
    config["recipe"] = {"eval_transform": resize, "optimizer": {"lr": 1e-3}, "global_batch_size": 2, "max_steps": 7}
    overrides = ["dataset=cityscapes", f"dataset.root={tmp_path}", "weights=old/secret_project/best.ckpt", "seed=1"]
    content = slim_content(checkpoint._replace(config=config, overrides=overrides))
    content[CHECKPOINT_KEY]["evaluated_step"] = 7
    content["callbacks"] = {"ExactResume": {"evaluation": to_plain(evaluated())}}
    content["optimizer_states"] = []
    torch.save(content, folder / "best.ckpt")
    return folder / "best.ckpt"


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


class TestFolder:
    def test_it_predicts_to_the_bit(self, tmp_path, run):
        predictor = Predictor(run, device="cpu")
        folder = predictor.save_pretrained(tmp_path / "mine")
        assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        image = torch.randint(256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        again = Predictor.from_pretrained(folder, trust=TRUST, device="cpu")
        for other in (again, Predictor(folder, device="cpu"), Predictor(folder / "model.safetensors", device="cpu")):
            network = predictor.model, other.model
            batch = predictor.prepare(image.permute(1, 2, 0).numpy())[None]
            with torch.no_grad():
                for one, two in zip(*(model(batch)[:2] for model in network), strict=True):
                    assert torch.equal(one, two)
            assert torch.equal(other(image).panoptic, predictor(image).panoptic)
        assert again.save_pretrained(tmp_path / "once_more") == tmp_path / "once_more"
        for name in ("README.md", "config.json", "model.safetensors"):
            assert (tmp_path / "once_more" / name).read_bytes() == (folder / name).read_bytes(), name

    def test_averaged_weights_and_those_of_8_bits(self, tmp_path):
        folder = save_pretrained("camvid", tmp_path / "mine", license="apache-2.0")
        ours, original = load_pretrained(folder), read_checkpoint("camvid")
        assert ours.info == original.info
        assert ours.network.keys() == original.network.keys()
        assert all(torch.equal(value, original.network[key]) for key, value in ours.network.items())
        card = (folder / "README.md").read_text()
        assert "| started from | efficientnet_lite0 |" in card or "| started from |" not in card
        assert "No numbers are stored" in card
        assert front_matter(folder)["license"] == "apache-2.0"

    @pytest.mark.slow
    def test_it_stands_where_a_checkpoint_does(self, tmp_path):
        folder = save_pretrained("camvid", tmp_path / "mine")
        Image.effect_noise((64, 48), 80).save(tmp_path / "a.png")
        for name, checkpoint in (("one", "camvid"), ("two", str(folder))):
            out = (f"output={tmp_path / name}", f"hydra.run.dir={tmp_path}/run")
            assert call("predict", f"checkpoint={checkpoint}", f"input={tmp_path}/a.png", "device=cpu", *out) == 0
        results = [(tmp_path / name / "a_semantic.png").read_bytes() for name in ("one", "two")]
        assert results[0] == results[1]
        ours, original = (read_weights(source).state for source in (folder, "camvid"))
        assert all(torch.equal(value, original[key]) for key, value in ours.items())

    def test_nothing_of_the_machine(self, tmp_path, run):
        folder = Predictor(run, device="cpu").save_pretrained(tmp_path / "mine")
        for path in folder.iterdir():
            content = path.read_bytes().decode("latin1")
            for private in (str(tmp_path), "/home/me", "secret", "me_and_my_account", "cache"):
                assert private not in content, (path.name, private)
        checkpoint = read_checkpoint(folder)
        assert checkpoint.overrides == ["dataset=cityscapes", "seed=1"]
        assert checkpoint.config["weights"] is None

    def test_config_for_tools(self, tmp_path, run):
        config = json.loads((save_pretrained(run, tmp_path / "mine") / "config.json").read_text())
        assert config["id2label"]["0"] == "road"
        assert config["label2id"]["car"] == 13
        assert (config["model_type"], config["task"], config["backbone"]) == ("pem", "panoptic", "tiny")

    def test_card_by_huggingface_hub(self, tmp_path, run):
        hub = pytest.importorskip("huggingface_hub")
        folder = save_pretrained(run, tmp_path / "mine", name="me/streets", license="mit")
        card = hub.ModelCard.load(folder / "README.md")
        data = card.data
        assert (data.library_name, data.license, data.pipeline_tag) == ("pem-lightning", "mit", "image-segmentation")
        assert "panoptic-segmentation" in data.tags
        assert data.model_name == "streets"
        numbers = evaluated().scalars()
        results = {r.metric_type: r.metric_value for r in data.eval_results}
        assert results["panoptic_quality"] == pytest.approx(numbers["val/PQ"], abs=0.01)
        assert results["mean_iou"] == pytest.approx(numbers["val/mIoU"], abs=0.01)
        assert {r.dataset_name for r in data.eval_results} == {"cityscapes"}
        assert 'Predictor.from_pretrained("me/streets")' in card.text
        assert "| road | 100.0 | 100.0 | 100.0 | 50.0 |" in card.text
        assert "| sky | - | - | - | - |" in card.text
        assert "| 13 | car | thing | 26 |" in card.text
        assert "python train.py dataset=cityscapes seed=1" in card.text

    def test_a_card_that_was_edited_is_kept(self, tmp_path, run):
        folder = save_pretrained(run, tmp_path / "mine")
        (folder / "README.md").write_text("by hand")
        save_pretrained(run, folder)
        assert (folder / "README.md").read_text() == "by hand"

    def test_metrics_of_the_run_or_given(self, tmp_path, run):
        content = torch.load(run, weights_only=True)
        del content["callbacks"]
        torch.save(content, run)
        found = evaluated().report(CITYSCAPES, 7)
        metrics = run.parent.parent / "metrics.json"
        metrics.write_text(json.dumps({**found, "val/PQ": 12.5}))
        assert "| PQ | 12.5 |" in (save_pretrained(run, tmp_path / "a") / "README.md").read_text()
        metrics.write_text(json.dumps({**found, "step": 8}))  # of another step than the checkpoint
        assert "No numbers" in (save_pretrained(run, tmp_path / "b") / "README.md").read_text()
        assert "model-index" not in front_matter(tmp_path / "b")
        assert "| PQ | " in (save_pretrained(run, tmp_path / "c", metrics=metrics) / "README.md").read_text()
        metrics.write_text("[1]")
        for given in (metrics, tmp_path / "missing.json", {"per_class": []}):
            with pytest.raises(UserError, match=r"metrics=.*give a metrics\.json of evaluate\.py"):
                save_pretrained(run, tmp_path / "d", metrics=given)
        assert not (tmp_path / "d").exists()

    def test_mistakes(self, tmp_path, run):
        predictor = Predictor(run, device="cpu")
        with pytest.raises(UserError, match=r"of from_parts\(\) has no checkpoint to save"):
            toy_predictor().save_pretrained(tmp_path / "mine")
        content = torch.load(run, weights_only=True)
        torch.save({**content, "global_step": 8}, run)
        with pytest.raises(UserError, match="is of step 8 by now, and was of 7"):
            predictor.save_pretrained(tmp_path / "mine")
        run.unlink()
        with pytest.raises(UserError, match=r"best\.ckpt does not exist"):
            predictor.save_pretrained(tmp_path / "mine")
        torch.save({"a": torch.zeros(1)}, run)
        with pytest.raises(UserError, match=r"was not written by train\.py"):
            predictor.save_pretrained(tmp_path / "mine")
        assert not (tmp_path / "mine").exists()
        with pytest.raises(UserError, match=r"has no model\.safetensors: give a folder that save_pretrained"):
            Predictor.from_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"does not exist"):
            Predictor.from_pretrained("no repository")

    @pytest.mark.parametrize(
        "target",
        ["os.system", "pem_lightning.checkpoints.hub.tempfile.mkdtemp", "pem_lightning.files.write_file", "tests.x.y"],
    )
    def test_foreign_code_is_not_run(self, tmp_path, run, target):
        content = torch.load(run, weights_only=True)
        content[CHECKPOINT_KEY]["config"]["network"]["backbone"] = {"_target_": target}
        torch.save(content, run)
        with pytest.raises(UserError, match=rf"wants to be built of {target}.*say trust="):
            Predictor.from_pretrained(run)


class TestHub:
    """With the functions of huggingface_hub, answered by a small server of our own."""

    @pytest.fixture
    def hub(self):
        return pytest.importorskip("huggingface_hub")

    def test_there_and_back(self, tmp_path, run, hub, monkeypatch):
        stored = tmp_path / "hub"
        calls = []

        def create_repo(repository, *, private, exist_ok):
            calls.append((repository, private, exist_ok))
            (stored / repository).mkdir(parents=True, exist_ok=True)
            return f"https://huggingface.co/{repository}"

        def upload_folder(*, repo_id, folder_path, commit_message, ignore_patterns):
            for path in Path(folder_path).iterdir():
                if path.name not in (ignore_patterns or ()):
                    (stored / repo_id / path.name).write_bytes(path.read_bytes())

        def hf_hub_download(repository, file, *, revision, library_name):
            calls.append((repository, file, revision))
            return str(stored / repository / file)

        monkeypatch.setattr(hub, "create_repo", create_repo)
        monkeypatch.setattr(hub, "upload_folder", upload_folder)
        monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(hub, "file_exists", lambda repository, file: (stored / repository / file).exists())
        monkeypatch.chdir(tmp_path)
        predictor = Predictor(run, device="cpu")
        assert predictor.push_to_hub("me/streets", private=True) == "https://huggingface.co/me/streets"
        again = Predictor.from_pretrained("me/streets", revision="v1", trust=TRUST, device="cpu")
        assert calls == [("me/streets", True, True), ("me/streets", "model.safetensors", "v1")]
        image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
        assert torch.equal(again(image).panoptic, predictor(image).panoptic)
        (stored / "me" / "streets" / "README.md").write_text("edited on the Hub")
        predictor.push_to_hub("me/streets")
        assert (stored / "me" / "streets" / "README.md").read_text() == "edited on the Hub"
        with pytest.raises(UserError, match="streets is no name of a repository: give user/name"):
            predictor.push_to_hub("streets")
        save_pretrained(run, tmp_path / "me" / "streets")  # a folder of that name comes first
        Predictor.from_pretrained("me/streets", trust=TRUST, device="cpu")
        assert len(calls) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("status", "code", "call", "message"),
        [
            (
                401,
                "RepoNotFound",
                LOAD,
                "there is no folder and no repository me/streets, or it is private: then log in",
            ),
            (403, "GatedRepo", LOAD, "me/streets is gated: ask for access"),
            (404, "RevisionNotFound", LOAD, "me/streets has no such revision"),
            (404, "EntryNotFound", LOAD, "me/streets has no model.safetensors"),
            (401, "", PUSH, "the Hub refuses me/streets (401): log in by `hf auth login`, or set HF_TOKEN"),
            (400, "", PUSH, "me/streets: the Hub cannot be reached or refuses ("),
        ],
        ids=["no_repository", "gated", "no_revision", "no_file", "no_login", "refused"],
    )
    def test_what_it_answers_is_one_line(self, tmp_path, hub, status, code, call, message):
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_HEAD  # noqa: N815

            def log_message(self, *_):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            printed = in_process(call, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path))
            server.shutdown()
        assert len(printed.splitlines()) == 1
        assert printed.startswith(message)

    @pytest.mark.slow
    def test_without_network(self, tmp_path, hub):
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        expected = "me/streets is not in the cache, and the Hub cannot be reached: check the network\n"
        assert in_process(LOAD, **offline) == expected
        assert in_process(PUSH, **offline).startswith("me/streets: the Hub cannot be reached or refuses (Offline")

    def test_without_the_package(self, tmp_path, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(UserError, match=r"no folder me/streets, and .* needs .*: pip install huggingface_hub"):
            Predictor.from_pretrained("me/streets")
        with pytest.raises(UserError, match="needs the package huggingface_hub: pip install huggingface_hub"):
            Predictor(run, device="cpu").push_to_hub("me/streets")
        Predictor(run, device="cpu").save_pretrained(tmp_path / "mine")


def in_process(call, **environment):
    """The message of what a function of `hub` raises in a process of its own."""
    code = f"""
from pem_lightning.checkpoints import hub
from pem_lightning.types import UserError
try:
    hub.{call}
except UserError as error:
    print(error)
"""
    given = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**given, **environment}, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
