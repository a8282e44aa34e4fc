"""The fast path against the reference, the authors' algorithm written plainly: in float64 they are one function."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning import build_pem, checkpoints
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.postprocess import panoptic, semantic, semantic_map
from pem_lightning.models.pem import padded_size
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions
from scripts.benchmark import reference as plain
from scripts.benchmark.reference.deformable_attention import ms_deform_attn
from tests.models.randomize import build_tiny, randomize

CASES = [pytest.param(f"city_pan_r50_{size}", marks=pytest.mark.slow) for size in ("96x160", "90x150")]
CASES += ["city_pan_stdc1_96x160", "city_pan_stdc1_90x150"]
THINGS = frozenset(range(11, 19))


@pytest.fixture(scope="module")
def networks(official_weights):
    """Gives the authors' two networks with the reference weights."""

    @cache
    def load(name):
        model = build_pem({"city_pan_r50": "resnet50", "city_pan_stdc1": "stdc1"}[name], num_classes=19).eval()
        model.load_state_dict(checkpoints.from_official(official_weights(name, seed=1)), strict=True)
        return model

    return load


def assert_same_predictions(actual, expected):
    assert actual.mask_logits.dtype == torch.float64
    torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-9)


def assert_same_results(predictions, image_size, output_size, resize_first, thresholds=(0.8, 0.8)):
    logits = predictions.class_logits[0], predictions.mask_logits[0]
    padded = tuple(4 * side for side in logits[1].shape[1:])
    at = {"padded_size": padded, "image_size": image_size, "output_size": output_size}
    expected = plain.semantic(*logits, **at, resize_first=resize_first)
    scores = semantic(*logits, **at, resize_first=resize_first)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
    assert torch.equal(semantic_map(*logits, **at, resize_first=resize_first), expected.argmax(0).int())
    options = {"thing_classes": THINGS, "object_mask_threshold": thresholds[0], "overlap_threshold": thresholds[1]}
    id_map, segments = panoptic(*logits, **at, **options)
    expected_map, expected_segments = plain.panoptic(*logits, **at, **options)
    assert segments == expected_segments
    assert torch.equal(id_map, expected_map)
    return len(segments)


def test_the_reference_is_the_authors_network(networks, reference):
    """In float32, against the authors' own numbers, so that the comparisons below mean something."""
    expected = np.load(reference / "pem" / "city_pan_stdc1_96x160.npz")
    with torch.no_grad():
        out = plain.predict(networks("city_pan_stdc1").float(), normalize(torch.from_numpy(expected["image"]))[None])
    torch.testing.assert_close(out.class_logits[0], torch.from_numpy(expected["pred_logits"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.mask_logits[0], torch.from_numpy(expected["pred_masks"]), rtol=0, atol=1e-3)
    assert len(out.auxiliary) == 6


@pytest.mark.parametrize("case", CASES)
def test_on_every_reference_case(case, networks, reference):
    network = networks(case.rsplit("_", 1)[0]).double()
    image = normalize(torch.from_numpy(np.load(reference / "pem" / f"{case}.npz")["image"]))[None].double()
    settings_ = json.loads((reference / "pem" / f"{case}.json").read_text())
    with torch.no_grad():
        expected, ours, fast = plain.predict(network, image), network(image), OptimizedNetwork(network)(image)
    assert_same_predictions(ours, expected)
    assert_same_predictions(fast, expected)
    image_size = tuple(image.shape[-2:])
    output_size = tuple(settings_["output_hw"] or image_size)
    low = settings_["panoptic_low"]
    thresholds = (low["object_mask_threshold"], low["overlap_threshold"])
    for resize_first in (True, False):
        assert_same_results(fast, image_size, image_size, resize_first)
        assert assert_same_results(fast, image_size, output_size, resize_first, thresholds) > 0


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 2), st.integers(0, 10**6))
def test_network_on_random_sizes(height, width, batch, seed):
    torch.manual_seed(seed)
    network = randomize(build_tiny(num_layers=4)).double().eval()
    images = torch.randn(batch, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = plain.predict(network, images)
        assert_same_predictions(network(images), expected)
        assert_same_predictions(OptimizedNetwork(network)(images), expected)


def test_an_image_with_only_empty_masks():
    torch.manual_seed(0)
    network = build_tiny().double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        last = network.transformer_decoder.mask_head.layers[-1]
        last.weight.zero_()
        last.bias.fill_(-1.0)  # mask features are never negative: all masks are empty
        assert_same_predictions(network(images), plain.predict(network, images))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 90),
    st.sampled_from([None, (31, 77), (90, 40)]),
    st.booleans(),
    st.sampled_from([0.5, 4.0, 30.0]),
    st.sampled_from([0, 9, 14]),
    st.integers(0, 10**6),
)
def test_postprocessing_on_random_sizes(height, width, output_size, resize_first, contrast, empty, seed):
    """From masks that are everywhere undecided to masks with a few sharp contours; some or all queries see nothing."""
    draw = torch.Generator().manual_seed(seed)
    full_height, full_width = padded_size(height, width)
    coarse = torch.randn(1, 14, 4, 5, generator=draw, dtype=torch.float64)
    size = (full_height // 4, full_width // 4)
    mask_logits = contrast * torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    mask_logits += 0.1 * contrast * torch.randn(mask_logits.shape, generator=draw, dtype=torch.float64)
    class_logits = contrast * torch.randn(1, 14, 20, generator=draw, dtype=torch.float64)
    class_logits[:, :empty, -1] += 9 + 4 * contrast
    predictions = Predictions(class_logits, mask_logits)
    assert_same_results(predictions, (height, width), output_size or (height, width), resize_first, (0.2, 0.3))


def test_deformable_attention_reads_whole_positions_as_they_are():
    """Two levels of 2 x 3 and 1 x 1 positions, values that name them."""
    values = torch.arange(7.0).view(1, 7, 1, 1) + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1)  # [2, 7, 1, 1]
    locations = torch.tensor([[(2.5 / 3, 0.25)], [(0.5, 0.5)]]).expand(2, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2, 1).expand(2, -1, -1, -1, -1)
    out = ms_deform_attn(values, [(2, 3), (1, 1)], locations, weights)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.75 * 2 + 0.25 * 6, 100 + 0.75 * 2 + 0.25 * 6]))


def test_deformable_attention_sees_nothing_outside_and_heads_do_not_mix():
    values = torch.ones(1, 4, 2, 1) * torch.tensor([1.0, 5.0])[:, None]
    locations = torch.tensor([(0.5, 0.5), (2.0, 0.5)]).view(1, 1, 2, 1, 1, 2)
    out = ms_deform_attn(values, [(2, 2)], locations, torch.ones(1, 1, 2, 1, 1))
    torch.testing.assert_close(out, torch.tensor([[[1.0, 0.0]]]))
