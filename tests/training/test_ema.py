import pytest
import torch
from torch import nn

from pem_lightning.training.averaging import AveragedNetwork


def network(weight, mean, count):
    norm = nn.BatchNorm1d(1)
    norm.weight.data.fill_(weight)
    norm.running_mean.fill_(mean)
    norm.num_batches_tracked.fill_(count)
    return norm


def test_weights_and_statistics_follow_and_counters_are_taken_over():
    followed = network(1.0, 0.0, 0)
    averaged = AveragedNetwork(followed, decay=0.15)
    weight, mean = 1.0, 0.0
    for step in range(1, 5):
        followed.weight.data.fill_(1.0 + step)
        followed.running_mean.fill_(-step)
        followed.num_batches_tracked.fill_(step)
        averaged.update(followed)
        decay = (0.1, 0.15, 0.15, 0.15)[step - 1]  # 1/10 keeps less than 0.15, 2/11 would keep more
        weight = decay * weight + (1 - decay) * (1.0 + step)
        mean = decay * mean + (1 - decay) * -step
        assert averaged.network.weight.item() == pytest.approx(weight)
        assert averaged.network.running_mean.item() == pytest.approx(mean)
        assert averaged.network.num_batches_tracked.item() == step
    assert followed.weight.item() == 5
    assert followed.training
    assert not averaged.network.training
    assert not any(p.requires_grad for p in averaged.network.parameters())


def test_it_goes_on_from_its_state_bit_by_bit():
    torch.manual_seed(0)
    steps = [torch.randn(1) for _ in range(6)]
    followed = network(1.0, 0.0, 0)
    through, first = AveragedNetwork(followed, 0.9), AveragedNetwork(followed, 0.9)
    for number, value in enumerate(steps):
        followed.weight.data.copy_(value)
        if number == 3:
            second = AveragedNetwork(network(7.0, 7.0, 7), 0.9)
            second.load_state_dict(first.state_dict())
            first = second
        through.update(followed)
        first.update(followed)
    assert torch.equal(first.network.weight, through.network.weight)
