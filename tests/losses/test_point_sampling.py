import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.losses.point_sampling import (
    PIXELS_AT_ONCE,
    choose_uncertain_points,
    sample_masks,
    sample_points,
    uniform,
)
from pem_lightning.models.mask2former_pixel_decoder import pixel_centres


def test_pixel_centres_give_pixels():
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    sampled = sample_points(features, pixel_centres([(5, 7)]).expand(2, -1, -1))
    torch.testing.assert_close(sampled, features.flatten(2), rtol=0, atol=1e-5)


def test_points_are_x_then_y_and_outside_is_zero():
    features = torch.tensor([[[[8.0, 0.0], [4.0, 0.0]]]])
    points = torch.tensor([[[0.25, 0.75], [0.5, 0.25], [0.0, 0.0], [0.25, 0.5]]])
    expected = torch.tensor([[[4.0, 4.0, 2.0, 6.0]]])  # at the corner three of the four neighbours lie outside
    torch.testing.assert_close(sample_points(features, points), expected)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    segments=st.integers(0, 6),
    at_once=st.sampled_from([1, 1000, 10**6]),
)
def test_masks_are_sampled_like_floats(seed, height, width, segments, at_once):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(segments, height, width, generator=generator) < 0.5
    points = torch.rand(segments, 9, 2, generator=generator)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    expected = sample_points(masks[:, None].float(), points).squeeze(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIXELS_AT_ONCE, "cpu", at_once)
        assert torch.equal(sample_masks(masks, points), expected)


@pytest.mark.parametrize(
    ("oversample", "ratio", "num_uncertain"), [(3.0, 0.0, 0), (3.0, 0.75, 15), (3.0, 1.0, 20), (1.0, 1.0, 20)]
)
def test_most_uncertain_candidates_come_first(oversample, ratio, num_uncertain):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 10)
    draws = []

    def rand(shape, device):
        draws.append(torch.rand(shape, device=device))
        return draws[-1]

    points = choose_uncertain_points(logits.clone().requires_grad_(), 20, oversample, ratio, rand)
    assert not points.requires_grad
    candidates, others = draws
    assert points.shape == (3, 20, 2)
    assert candidates.shape == (3, 20 * oversample, 2)
    assert torch.equal(points[:, num_uncertain:], others)
    certainty = sample_points(logits[:, None], candidates).squeeze(1).abs().sort().values[:, :num_uncertain]
    chosen = sample_points(logits[:, None], points[:, :num_uncertain]).squeeze(1).abs().sort().values
    assert torch.equal(chosen, certainty)


def test_random_numbers_are_uniform_and_follow_torchs_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return uniform((3, 20000), torch.device("cpu")), uniform((5,), torch.device("cpu"))

    numbers, others = draw(1)
    assert numbers.dtype == torch.float32
    assert numbers.shape == (3, 20000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    torch.testing.assert_close(numbers.histc(10, 0, 1) / numbers.numel(), torch.full((10,), 0.1), rtol=0, atol=0.01)
    assert not torch.equal(numbers[0, :5], others)
    assert torch.equal(draw(1)[0], numbers)
    assert not torch.equal(draw(2)[0], numbers)
