import pytest
import torch

from pem_lightning.benchmark.contestants import Fast, Library, Straightforward
from pem_lightning.benchmark.equality import compare, observe, other_library, panoptic_classes, record_prototypes
from pem_lightning.benchmark.weights import random_weights
from pem_lightning.inference.task import Result
from pem_lightning.networks.prototype_attention import select_prototypes
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


def test_recorded_prototypes_are_those_that_were_selected():
    """Against the positions that `select_prototypes` returns, on one layer."""
    torch.manual_seed(0)
    network = random_weights("stdc1").network
    layer = network.transformer_decoder.layers[0].cross_attention
    queries, query_positions = torch.randn(2, 9, 256), torch.randn(9, 256)
    features, masks = torch.randn(2, 256, 6, 7), torch.randn(2, 9, 6, 7)
    with torch.no_grad(), record_prototypes(layer) as recorded:
        layer(queries, query_positions, features, masks)
        keys = layer.feature_conv(layer.feature_norm(features))
        keys = torch.nn.functional.linear(
            keys.permute(0, 2, 3, 1).flatten(1, 2), layer.feature_linear.weight, layer.feature_linear.bias
        )
        keys = torch.nn.functional.normalize(keys, dim=-1)
        projected = layer.query_linear(layer.query_norm(queries + query_positions))
        projected = torch.nn.functional.normalize(projected, dim=-1)
    _, positions = select_prototypes(keys, projected, masks.flatten(2) < 0, 8)
    assert len(recorded) == 1
    assert torch.equal(recorded[0], positions)


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
