"""Downloads by name, from a server that the test plays: nothing comes from the internet."""

import hashlib
import http.client
import io
import re
import urllib.error

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.checkpoints import DOWNLOADS, load_weights
from pem_lightning.checkpoints.pretrained import download
from pem_lightning.models.backbones import BACKBONES
from pem_lightning.types import UserError
from tests.checkpoint_files import random_backbone, torchvision_state


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def serve(monkeypatch):
    """Let a name be served with a content, under its true hash or another."""

    def serve(content, digest=None):
        data = io.BytesIO()
        torch.save(content, data)
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


def test_every_name_is_one_of_ours_with_a_hash():
    for name, url in DOWNLOADS.items():
        backbone = name.split("/")[1].split("_")[0]
        assert backbone in BACKBONES
        assert re.fullmatch(rf"https://download\.pytorch\.org/models/{backbone}-[0-9a-f]{{8}}\.pth", url)
    assert len(set(DOWNLOADS.values())) == len(DOWNLOADS)


def test_it_is_downloaded_once(cache, serve):
    backbone = random_backbone("resnet18")
    served = serve(torchvision_state(backbone))
    for _ in range(2):
        network = build_pem("resnet18", num_classes=1, num_layers=1)
        report = load_weights(network, "torchvision/resnet18")
        assert torch.equal(network.backbone.layer4[1].conv2.weight, backbone.layer4[1].conv2.weight)
    assert served == [DOWNLOADS["torchvision/resnet18"]]
    assert report.source == "torchvision/resnet18"


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torchvision").mkdir()
    torch.save(random_backbone("resnet18").state_dict(), tmp_path / "torchvision" / "resnet18")
    load_weights(build_pem("resnet18", num_classes=1, num_layers=1), "torchvision/resnet18")


def test_another_hash_is_refused(cache, serve):
    serve({"a": torch.ones(1)}, digest="0" * 8)
    with pytest.raises(UserError, match="has another hash than its name says"):
        download("torchvision/resnet18")
    assert list(cache.iterdir()) == []


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_a_download_is_not_trusted(cache, serve, capsys):
    serve({"a": Malicious()})
    with pytest.raises(UserError, match="damaged in the cache: delete"):
        download("torchvision/resnet18")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), TimeoutError("slow"), ConnectionResetError(), http.client.IncompleteRead(b"")],
)
def test_without_a_network_the_manual_way_is_named(cache, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torch.hub.urlopen", fail)
    message = r"cannot be downloaded \(.*\): download https://\S+/resnet50-0676ba61\.pth elsewhere and say weights=FILE"
    with pytest.raises(UserError, match=message) as caught:
        download("torchvision/resnet50")
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_cache_is_named(cache):
    cache.mkdir()
    (cache / "resnet18-f37072fd.pth").write_bytes(b"half a fi")
    with pytest.raises(UserError, match=r"damaged in the cache: delete .*/resnet18-f37072fd\.pth and try again"):
        download("torchvision/resnet18")
