import sys

import pytest
import torch

from pem_lightning.benchmark.peers import PEERS, build_peer
from pem_lightning.benchmark.timing import Clock
from pem_lightning.types import UserError

SIZE = (64, 96)


def test_a_missing_library_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in PEERS:
        with pytest.raises(UserError, match=r"^peers need transformers .*requirements-bench.txt$"):
            build_peer(name, "float32", SIZE)


def peer(name, precision="float32", size=SIZE):
    pytest.importorskip("transformers", reason="peers need transformers (requirements-bench.txt)")
    return build_peer(name, precision, size)


@pytest.mark.parametrize(("name", "precision"), [("segformer_b0", "float32"), ("eomt_small", "bfloat16")])
def test_semantic_peers_make_maps_of_the_images_size(name, precision):
    contestant = peer(name, precision)
    clock = Clock()
    clock.start()
    images = torch.randn(2, 3, *SIZE)
    output = contestant.run(images, clock)
    assert list(clock.stop()[1]) == ["network", "post-processing"]
    assert contestant.tasks == ("semantic",)
    assert contestant.name == f"{name} {precision}"
    maps = contestant.postprocess(output, SIZE, contestant.tasks)
    assert [m.shape for m in maps] == [SIZE, SIZE]


@pytest.mark.slow
def test_mask2former_makes_both_maps_and_has_the_published_size():
    contestant = peer("mask2former_r50")
    output = contestant.run(torch.randn(1, 3, *SIZE))
    assert contestant.class_logits(output).shape == (1, 100, 20)
    contestant.threshold = 0.0
    semantic, panoptic = contestant.postprocess(output, SIZE, contestant.tasks)
    assert semantic.shape == panoptic["segmentation"].shape == SIZE
    assert sum(p.numel() for p in contestant.network.parameters()) / 1e6 == pytest.approx(44.0, abs=0.1)
    assert 500 < contestant.gmacs(1024, 2048) < 560  # the paper's table counts 526


def test_eomt_windows_cover_the_image():
    contestant = peer("eomt_small", size=(32, 80))
    output = contestant.predict(torch.randn(1, 3, 32, 80))
    assert output.patch_offsets == [(0, 0, 32), (0, 24, 56), (0, 48, 80)]
    assert output.masks_queries_logits.shape == (3, 100, 8, 8)
    assert "3 windows of 32 x 32" in contestant.note


def test_eomt_attention_is_counted():
    """Counted as PyTorch counts matrix products, on a size where attention weighs."""
    contestant = peer("eomt_small", size=(32, 32))
    tokens = 4 + 5  # patches, class token and registers; the last three layers see 100 queries, too
    linear, attention = 12 * 384**2, 2 * 384
    layers = 9 * tokens * (linear + attention * tokens) + 3 * (tokens + 100) * (linear + attention * (tokens + 100))
    heads = 3 * 100 * 384**2  # mask embeddings; the rest is smaller
    assert contestant.gmacs(32, 32) == pytest.approx((layers + heads) / 1e9, rel=0.05)


def test_eomt_says_which_sizes_it_takes():
    pytest.importorskip("transformers", reason="peers need transformers (requirements-bench.txt)")
    with pytest.raises(UserError, match="multiple of 16, not 90"):
        build_peer("eomt_small", "float32", (90, 150))
