import torch

from scripts.benchmark.reference.deformable_attention import ms_deform_attn


def test_whole_positions_are_read_as_they_are():
    """Two levels of 2 x 3 and 1 x 1 positions, values that name them."""
    values = torch.arange(7.0).view(1, 7, 1, 1) + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1)  # [2, 7, 1, 1]
    locations = torch.tensor([[(2.5 / 3, 0.25)], [(0.5, 0.5)]]).expand(2, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2, 1).expand(2, -1, -1, -1, -1)
    out = ms_deform_attn(values, [(2, 3), (1, 1)], locations, weights)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.75 * 2 + 0.25 * 6, 100 + 0.75 * 2 + 0.25 * 6]))


def test_outside_there_is_nothing_and_heads_do_not_mix():
    values = torch.ones(1, 4, 2, 1) * torch.tensor([1.0, 5.0])[:, None]
    locations = torch.tensor([(0.5, 0.5), (2.0, 0.5)]).view(1, 1, 2, 1, 1, 2)
    out = ms_deform_attn(values, [(2, 2)], locations, torch.ones(1, 1, 2, 1, 1))
    torch.testing.assert_close(out, torch.tensor([[[1.0, 0.0]]]))
