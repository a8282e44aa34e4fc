import pytest
import torch

from pem_lightning.benchmark.contestants import Fast, Library, Straightforward
from pem_lightning.benchmark.equality import compare, observe, other_library, panoptic_classes
from pem_lightning.benchmark.weights import random_weights
from pem_lightning.inference.postprocess import Result
from pem_lightning.types import Segment


@pytest.fixture(scope="module")
def weights():
    return random_weights("stdc1")


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_a_path_does_not_differ_from_itself(weights, images):
    path = Library(weights)
    difference = compare(observe(path, images), observe(path, images))
    assert difference.pixels == 2 * 64 * 96
    assert (difference.semantic_pixels, difference.panoptic_pixels, difference.prototype_flips) == (0, 0, 0)
    assert (difference.class_logits, difference.mask_logits) == (0, 0)
    assert difference.prototypes == 6 * 2 * 8 * 100
    assert difference.to_dict()["semantic_share"] == 0


def test_the_fast_path_is_close_to_the_straightforward_one(weights, images):
    paths = [Fast(weights), Straightforward(weights)]
    for path in paths:
        path.threshold = 0.0
    difference = compare(*(observe(path, images) for path in paths))
    assert difference.semantic_pixels < 0.05 * difference.pixels
    assert difference.panoptic_pixels < 0.05 * difference.pixels
    assert difference.mask_logits < 0.1 * difference.largest_mask_logit
    assert difference.prototype_flips <= 0.01 * difference.prototypes


def test_another_network_differs_in_everything(weights, images):
    paths = [Library(weights), Library(random_weights("stdc1", seed=1))]
    for path in paths:
        path.threshold = 0.0
    difference = compare(*(observe(path, images) for path in paths))
    assert difference.semantic_pixels > 0.1 * difference.pixels
    assert difference.panoptic_pixels > 0.1 * difference.pixels
    assert difference.prototype_flips > 0.5 * difference.prototypes
    assert difference.class_logits > 0.1


def test_prototypes_are_seen_on_every_path(weights, images):
    """The straightforward path tells its own; hardly any differ by rounding, and nothing stays behind."""
    library, straightforward = Library(weights), Straightforward(weights)
    one, other = observe(library, images).prototypes, observe(straightforward, images).prototypes
    assert [x.shape for x in one] == [x.shape for x in other] == [(2, 8, 100)] * 6
    assert torch.stack(one).ne(torch.stack(other)).float().mean() < 0.01
    assert straightforward.network.prototypes is None


def test_prototypes_of_a_compiled_network_are_not_seen(weights, images):
    path = Fast(weights)
    path.compile = "default"  # in name only, which spares the compiler
    observation = observe(path, images)
    assert observation.prototypes == []
    assert compare(observation, observe(Library(weights), images)).prototype_flips is None


def test_panoptic_maps_are_compared_by_class():
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    segments = (Segment(1, 7, False), Segment(2, 11, True), Segment(3, 11, True))
    assert panoptic_classes(Result(panoptic=ids, segments=segments)).tolist() == [[-1, 7], [11, 11]]
    assert panoptic_classes(Result(panoptic=torch.zeros(2, 2, dtype=torch.int32))).tolist() == [[-1, -1], [-1, -1]]


def test_the_yardstick_switches_onednn_off_and_on_again():
    before = torch.backends.mkldnn.enabled
    name, context = other_library(torch.device("cpu"))
    with context:
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before
    assert "oneDNN" in name
