import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.benchmark.peers import PEERS
from pem_lightning.benchmark.settings import Settings, describe_environment, load_images
from pem_lightning.preprocess import normalize
from pem_lightning.types import UserError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbones": ("resnet99",)}, r"--backbones resnet99: choose of .*resnet50"),
        ({"precisions": ("float8",)}, r"--precisions float8: choose of float32, bfloat16, float16"),
        ({"compile": ("fast",)}, r"--compile fast: choose of none, default"),
        ({"contestants": ("slow",)}, r"--contestants slow: choose of straightforward, library, fast"),
        ({"peers": ("yolo",)}, r"--peers yolo: choose of all, none, mask2former_r50"),
        ({"device": "tpu"}, r"--device tpu: choose of cpu, cuda, auto"),
        ({"rounds": 0}, r"--rounds 0: give 1 or more"),
        ({"batch": -1}, r"--batch -1: give 1 or more"),
        ({"threads": 0}, r"--threads 0: give 1 or more"),
        ({"kept_queries": 0}, r"--kept-queries 0: give 1 or more"),
        ({"warmup": -1}, r"--warmup -1: give 0 or more"),
        ({"size": (16, 64)}, r"--size 16x64: each side needs 32 pixels or more"),
    ],
)
def test_mistakes_are_named_with_the_cure(wrong, message):
    with pytest.raises(UserError, match=message):
        Settings(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_asked_for():
    with pytest.raises(UserError, match="finds no GPU here"):
        Settings(device="cuda")
    assert Settings().torch_device == torch.device("cpu")


def test_all_peers_and_none():
    assert Settings(peers=("all",)).peer_names == tuple(PEERS)
    assert Settings(peers=("none",)).peer_names == ()


def test_noise_is_the_same_every_time():
    images = load_images(Settings(size=(32, 64), batch=2, device="cpu"))
    assert images.shape == (2, 3, 32, 64)
    assert torch.equal(images, load_images(Settings(size=(32, 64), batch=2, device="cpu")))


def test_a_photograph_is_resized_and_normalised(tmp_path):
    pixels = np.full((50, 70, 3), (10, 200, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    images = load_images(Settings(size=(32, 64), batch=2, device="cpu", image=tmp_path / "photo.png"))
    colour = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1)
    torch.testing.assert_close(images, normalize(colour.expand(3, 32, 64))[None].expand(2, -1, -1, -1))


def test_the_environment_is_described():
    found = describe_environment(torch.device("cpu"), "python scripts/benchmark.py")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == found["cpu"] != ""
