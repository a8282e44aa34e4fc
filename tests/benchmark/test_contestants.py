from dataclasses import replace

import pytest
import torch

from pem_lightning.benchmark.contestants import (
    Fast,
    Library,
    Straightforward,
    choose_threshold,
    count_kept,
    fast_name,
)
from pem_lightning.benchmark.roofline import estimate_bytes
from pem_lightning.benchmark.timing import Clock
from pem_lightning.benchmark.weights import CITYSCAPES_CLASSES, CITYSCAPES_THINGS, random_weights
from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.flops import count_gmacs

SIZE = (64, 96)


@pytest.fixture(scope="module")
def weights():
    return random_weights("stdc1")


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_the_setting_is_that_of_cityscapes():
    assert (CITYSCAPES.num_classes, CITYSCAPES.thing_classes) == (CITYSCAPES_CLASSES, CITYSCAPES_THINGS)


def test_random_weights_behave_like_trained_ones(weights, images):
    with torch.no_grad():
        out = weights.network(images)
        features = weights.network.backbone(images)
    assert not weights.network.training
    assert all(0.1 < float(f.std()) < 10 for f in features)
    assert 1 < float(out.mask_logits.abs().max()) < 1000
    offsets = [m.offset.weight for m in weights.network.modules() if isinstance(m, DeformableConv)]
    assert len(offsets) == 3
    assert all(w.abs().min() > 0 for w in offsets)
    again = random_weights("stdc1").network.state_dict()
    assert all(torch.equal(a, again[name]) for name, a in weights.network.state_dict().items())


def test_drawing_weights_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    random_weights("stdc1")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", [Straightforward, Library, Fast])
def test_every_path_tells_its_stages_and_makes_all_results(kind, weights, images):
    contestant = kind(weights)
    clock = Clock()
    clock.start()
    output = contestant.run(images, clock)
    total, stages = clock.stop()
    assert list(stages) == ["backbone", "pixel decoder", "transformer decoder", "post-processing"]
    assert all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) <= total
    results = contestant.postprocess(output, SIZE, ("semantic", "panoptic"))
    assert [r.semantic.shape for r in results] == [r.panoptic.shape for r in results] == [SIZE] * 2
    assert [r.panoptic for r in contestant.postprocess(output, SIZE, ("semantic",))] == [None, None]
    assert [r.semantic for r in contestant.postprocess(output, SIZE, ("panoptic",))] == [None, None]


def test_a_run_is_not_timed_by_the_next_ones_clock(weights, images):
    """Paths share a network, so a hook that stayed would end stages of others."""
    clocks = Clock(), Clock()
    for clock in clocks:
        clock.start()
        Library(weights).run(images, clock)
    first, second = (sum(clock.stop()[1].values()) for clock in clocks)
    assert first > 0
    assert second > 0
    clocks[0].start()
    Library(weights).run(images, clocks[1])
    assert clocks[0].stop()[1] == {}


def test_operations_are_those_of_the_path(weights):
    straight, library, fast = (c.gmacs(64, 64) for c in (Straightforward(weights), Library(weights), Fast(weights)))
    assert library == count_gmacs(weights.network, 64, 64)
    assert fast < library < straight  # no normalisations; no masks at full size after every layer


@pytest.mark.slow
def test_a_compiled_path_is_counted_as_if_it_was_not_and_has_one_stage(weights, images):
    compiled = Fast(weights, compile="default")
    assert compiled.name == fast_name("stdc1", compile="default") == "stdc1 fast float32 compile=default"
    assert compiled.stage_ends() == {}
    assert compiled.last_stage == "network"
    assert compiled.gmacs(64, 64) == Fast(weights).gmacs(64, 64)
    bytes_moved = estimate_bytes(compiled.uncompiled().predict, images)
    assert bytes_moved == estimate_bytes(Fast(weights).predict, images)


def test_the_settings_of_a_checkpoint_reach_both_paths(weights, images):
    settings = {"resize_first": False, "object_mask_threshold": 0.0, "overlap_threshold": 0.0}
    trained = replace(weights, inference=settings)
    fast, straight = Fast(trained), Straightforward(trained)
    assert fast.threshold == straight.threshold == 0.0
    with torch.no_grad():
        output = straight.predict(images)
    for a, b in zip(*(c.postprocess(output, SIZE, c.tasks) for c in (fast, straight)), strict=True):
        assert torch.equal(a.panoptic, b.panoptic)
        assert len(a.segments) == len(b.segments) > 5  # with the usual overlap threshold there would be fewer
        assert (a.semantic != b.semantic).sum() <= 2


def test_the_threshold_keeps_as_many_queries_as_wanted():
    logits = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    logits[0, :10, -1] = 20  # no object
    objects = int((logits[0].argmax(-1) != 5).sum())
    assert 7 < objects <= 40
    for wanted in (1, 7, objects):
        assert count_kept(logits, choose_threshold(logits, wanted)) == wanted
    assert count_kept(logits, choose_threshold(logits, objects + 1)) == objects


def test_queries_that_are_equally_sure_are_kept_together():
    logits = torch.zeros(1, 30, 6)
    logits[0, :, 0] = 1
    logits[0, :3, 0] = 2
    logits[0, 20:, 0] = 0.5
    for wanted, kept in ((2, 3), (3, 3), (4, 20), (20, 20), (25, 30)):
        assert count_kept(logits, choose_threshold(logits, wanted)) == kept
    logits[0, :, -1] = 9  # no object anywhere
    assert count_kept(logits, choose_threshold(logits, 4)) == 0
