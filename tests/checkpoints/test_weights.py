"""Networks start from what people have: every accepted format, loaded and compared with the network that wrote it."""

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.checkpoints import from_official, load_weights, read_checkpoint
from pem_lightning.checkpoints.pretrained import convert_weights, read_weights
from pem_lightning.models.backbones.base import Backbone
from pem_lightning.models.pem import PEM
from pem_lightning.types import ClassInfo, DatasetInfo, UserError
from tests.checkpoint_files import (
    CLASSES,
    detectron2_pickle,
    random_backbone,
    stdc_file,
    torchvision_state,
    write_checkpoint,
    write_pickle,
)


def network_for(backbone, **changes):
    torch.manual_seed(99)
    return build_pem(backbone, **{"num_classes": 1, "num_queries": 5, "num_layers": 1, **changes})


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def assert_same_features(network, backbone):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pairs = zip(network.backbone.eval()(images), backbone(images), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def parts(names):
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_a_resnet_of_torchvision_or_timm(tmp_path, name, wrapping):
    backbone = random_backbone(name)
    state = torchvision_state(backbone)
    path = saved(tmp_path / "a.pth", {wrapping: state, "epoch": 3} if wrapping else state)
    network = network_for(name)
    report = load_weights(network, path)
    assert_same_features(network, backbone)
    assert report.kind == "torchvision or timm ResNet"
    assert report.unexpected == ["fc.weight", "fc.bias"]
    assert parts(report.missing) == {"pixel_decoder", "transformer_decoder"}
    assert parts(report.loaded) == {"backbone"}


def test_a_resnet_saved_from_several_gpus_by_an_old_torch_in_half_precision(tmp_path):
    backbone = random_backbone("resnet34")
    state = {
        f"module.{key}": value.half() if value.is_floating_point() else value
        for key, value in torchvision_state(backbone).items()
        if not key.endswith("num_batches_tracked")
    }
    path = saved(tmp_path / "a.pth", state, _use_new_zipfile_serialization=False)
    network = network_for("resnet34")
    load_weights(network, path)
    assert torch.equal(network.backbone.conv1.weight, backbone.conv1.weight.half().float())
    assert network.backbone.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize(("name", "numpy_core"), [("resnet50", "numpy.core"), ("resnet101", "numpy._core")])
def test_detectron2s_pickle(tmp_path, name, numpy_core):
    backbone = random_backbone(name)
    path = write_pickle(tmp_path / "R.pkl", detectron2_pickle(backbone), numpy_core)
    network = network_for(name, backbone_norm="frozen")
    report = load_weights(network, path)
    assert_same_features(network, backbone)
    assert report.kind == "detectron2 ResNet"
    assert report.unexpected == ["stem.fc.weight", "stem.fc.bias"]
    assert not any(name.startswith("backbone.") for name in report.missing)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_stdc_authors_file(tmp_path, prefix):
    backbone = random_backbone("stdc1")
    path = saved(tmp_path / "STDC.tar", stdc_file(backbone, prefix), _use_new_zipfile_serialization=False)
    network = network_for("stdc1")
    report = load_weights(network, path)
    assert_same_features(network, backbone)
    assert report.kind == "STDC authors"
    assert parts(report.unexpected) == {"x2", "x4", "x8", "x16", "x32", "conv_last", "fc", "bn", "linear"}
    duplicates = [name for name in report.unexpected if name.startswith("x")]
    assert len(duplicates) == len(backbone.state_dict())


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("case", ["city_pan_stdc1", "city_pan_r50"])
def test_the_pem_authors_checkpoint(tmp_path, official_weights, case, form):
    official = official_weights(case, seed=1)
    if form == "torch":
        path = saved(tmp_path / "model_final.pth", {"model": official, "iteration": 9})
    else:
        arrays = {key: value.numpy() for key, value in official.items()}
        path = write_pickle(tmp_path / "a.pkl", {"model": arrays})
    backbone = "stdc1" if "stdc1" in case else "resnet50"
    network = build_pem(backbone, num_classes=19)
    report = load_weights(network, path)
    expected = from_official(official)
    assert {k for k, v in network.state_dict().items() if not torch.equal(v, expected[k].reshape(v.shape))} == set()
    assert report.kind == "PEM authors"
    assert (report.missing, report.mismatched, report.reinitialized) == ([], {}, [])
    left = {"x2", "x4", "x8", "x16", "x32"} if backbone == "stdc1" else set()
    assert {name.split(".")[1] for name in report.unexpected if name.startswith("backbone")} == left


def info(*names):
    return DatasetInfo("other", tuple(ClassInfo(name, (0, 0, 0), True, i) for i, name in enumerate(names)))


def test_our_own_with_the_same_classes_is_taken_over_whole(tmp_path):
    source = network_for(random_backbone("resnet18"))
    path = write_checkpoint(tmp_path / "a.ckpt", source)
    network = network_for("resnet18", num_queries=5)
    report = load_weights(network, path, info(CLASSES[0]["name"]))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
    assert list(report.rows()) == ["loaded"]
    assert report.kind == "PEM-Lightning, step 12 on toy"


@pytest.mark.parametrize("names", [("x", "y"), ("x",)])
def test_our_own_with_other_classes_has_its_class_head_initialized_anew(tmp_path, names):
    """Also if there happen to be as many."""
    source = network_for(random_backbone("resnet18"))
    network = network_for("resnet18", num_classes=len(names))
    before = network.transformer_decoder.class_head.weight.detach().clone()
    with torch.no_grad():
        source.transformer_decoder.class_head.weight.add_(1)
    path = write_checkpoint(tmp_path / "a.ckpt", source)
    report = load_weights(network, path, info(*names))
    head = [f"transformer_decoder.class_head.{what}" for what in ("weight", "bias")]
    assert report.reinitialized == head
    assert list(report.rows()) == ["loaded", "class head, re-initialised"]
    assert torch.equal(network.transformer_decoder.class_head.weight, before)
    assert {k for k, v in network.state_dict().items() if not torch.equal(v, source.state_dict()[k])} <= set(head)


def test_our_own_with_other_queries_and_layers_is_taken_over_in_part(tmp_path):
    source = network_for(random_backbone("resnet18"), num_queries=7, num_layers=2)
    network = network_for("resnet18")
    report = load_weights(network, write_checkpoint(tmp_path / "a.ckpt", source))
    assert_same_features(network, source.backbone.eval())
    queries = {f"transformer_decoder.query_{what}.weight" for what in ("features", "positions")}
    assert {name for name, shapes in report.mismatched.items() if shapes == ([7, 256], [5, 256])} == queries
    assert report.mismatched.keys() - queries == {"transformer_decoder.level_embedding.weight"}
    assert any(name.startswith("transformer_decoder.layers.1.") for name in report.unexpected)


def caffe2(wrapping):
    blobs = {"conv1_w": torch.ones(2).numpy(), "res2_0_branch2a_w": torch.ones(2).numpy()}
    return {"blobs": {"blobs": blobs}, "model": {"model": blobs, "__author__": "Caffe2"}, None: blobs}[wrapping]


@pytest.mark.parametrize("wrapping", [None, "blobs", "model"])
def test_caffe2s_are_refused_with_the_reason(tmp_path, wrapping):
    path = write_pickle(tmp_path / "R-50.pkl", caffe2(wrapping))
    with pytest.raises(UserError, match=r"BGR images.*stride in another convolution: take torchvision's"):
        read_weights(path)


def test_what_is_known_by_its_author_alone(tmp_path):
    content = {"model": {"stem.conv1.weight": torch.ones(2).numpy()}, "__author__": "Caffe2"}
    with pytest.raises(UserError, match="BGR"):
        read_weights(write_pickle(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("content", [{"classifier.weight": torch.ones(2)}, {"epoch": 3}, {}])
def test_what_is_of_no_known_kind(tmp_path, content):
    with pytest.raises(UserError, match=r"is of no known kind \(it holds .*docs/training\.md"):
        read_weights(saved(tmp_path / "a.pth", content))


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ("resnet50", "resnet18", "it looks like resnet50, choose backbone=resnet50"),
        ("resnet18", "resnet34", "it looks like resnet18, choose backbone=resnet18"),
        ("resnet18", "stdc1", "it looks like resnet18, choose backbone=resnet18"),
        ("stdc1", "stdc2", "it looks like stdc1, choose backbone=stdc1"),
    ],
)
def test_an_uncovered_backbone_is_an_error_and_nothing_is_changed(tmp_path, given, wanted, message):
    path = saved(tmp_path / "a.pth", random_backbone(given).state_dict())
    network = network_for(wanted)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"does not cover the backbone \(backbone\..*differences\): {message}"):
        load_weights(network, path)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("lost", ["layer4.1.bn2.running_var", "bn1.bias", "layer2.0.downsample.0.weight"])
def test_not_one_parameter_or_statistic_may_lack(tmp_path, lost):
    state = dict(random_backbone("resnet18").state_dict())
    del state[lost]
    with pytest.raises(UserError, match=rf"backbone\.{lost} is missing; 1 differences\): give the whole weights"):
        load_weights(network_for("resnet18"), saved(tmp_path / "a.pth", state))


class Other(Backbone):
    channels = (8, 8, 8, 8)

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Conv2d(3, 8, 1)

    def forward(self, images):
        return []


def test_a_backbone_of_timms_is_referred_to_its_own_option(tmp_path):
    path = saved(tmp_path / "a.pth", random_backbone("resnet18").state_dict())
    network = network_for("resnet18")
    other = PEM(Other(), network.pixel_decoder, network.transformer_decoder)
    with pytest.raises(UserError, match=r"with backbone\.pretrained=FILE"):
        load_weights(other, path)
    report = load_weights(other, write_checkpoint(tmp_path / "own.ckpt", other))
    assert list(report.rows()) == ["loaded"]


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none of the names .*did you mean torchvision/resnet50\?"):
        read_weights("torchvision/resnet_50")
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="does not exist: give a file or one of the names torchvision/resnet18"):
            read_weights(path)


def test_a_checkpoint_that_lacks_what_ours_have(tmp_path):
    path = saved(tmp_path / "a.ckpt", {"pem_lightning": {}, "state_dict": {}})
    with pytest.raises(UserError, match=r"lacks what train\.py writes"):
        read_weights(path)


SOURCES = {
    "torchvision": ("resnet18", lambda path, b: saved(path, torchvision_state(b))),
    "detectron2": ("resnet50", lambda path, b: write_pickle(path, detectron2_pickle(b))),
    "stdc": ("stdc1", lambda path, b: saved(path, stdc_file(b))),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_converted_weights_load_like_the_original(tmp_path, kind):
    name, write = SOURCES[kind]
    backbone = random_backbone(name)
    report = convert_weights(write(tmp_path / "in", backbone), tmp_path / "new" / "out.pth")
    assert report.missing == []
    again = load_weights(network := network_for(name), tmp_path / "new" / "out.pth")
    assert_same_features(network, backbone)
    assert again.kind == "PEM-Lightning"
    assert (again.unexpected, again.loaded) == ([], report.loaded)
    assert all(isinstance(v, torch.Tensor) for v in torch.load(tmp_path / "new" / "out.pth").values())


def test_whole_networks_are_converted_whole(tmp_path, official_weights):
    official = official_weights("city_pan_stdc1", seed=1)
    convert_weights(saved(tmp_path / "in", official), tmp_path / "official")
    network = build_pem("stdc1", num_classes=19)
    network.load_state_dict(torch.load(tmp_path / "official"), strict=True)
    convert_weights(write_checkpoint(tmp_path / "a.ckpt", network), tmp_path / "own")
    own, checkpoint = torch.load(tmp_path / "own"), read_checkpoint(tmp_path / "a.ckpt").network
    assert own.keys() == checkpoint.keys()
    assert all(torch.equal(own[key], value) for key, value in checkpoint.items())


def test_an_uncovered_backbone_is_not_converted(tmp_path):
    path = saved(tmp_path / "in", random_backbone("resnet18").state_dict())
    report = convert_weights(path, tmp_path / "out", backbone="resnet34")
    with pytest.raises(UserError, match="does not cover the backbone"):
        report.check_backbone()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="unknown backbone 'resnet3'"):
        convert_weights(path, tmp_path / "out", backbone="resnet3")
    short = saved(tmp_path / "short", {"conv1.weight": torch.ones(1)})
    with pytest.raises(UserError, match="say --backbone NAME"):
        convert_weights(short, tmp_path / "out")
