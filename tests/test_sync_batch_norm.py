import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pem_lightning.cli.build import build_trainer
from pem_lightning.models.layers import FrozenBatchNorm2d
from pem_lightning.training.distributed import PlainSyncBatchNorm, SyncBatchNormCPU
from tests.jobs import compose


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(("cpu", "kind"), [(False, nn.SyncBatchNorm), (True, SyncBatchNormCPU)])
def test_plain_layers_are_synchronised_and_their_subclasses_are_not(cpu, kind):
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(3)), FrozenBatchNorm2d(4), NormAct(5))
    before = network.state_dict(keep_vars=True)
    network[1].eval()
    synced = PlainSyncBatchNorm(cpu).apply(network)
    assert synced is network
    kinds = [type(m) for m in network.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == [kind, kind, FrozenBatchNorm2d, NormAct]
    assert (network[0].training, network[1][0].training) == (True, False)
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("settings", "plugins"),
    [
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"], 1),
        (["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.sync_batchnorm=true"], 1),
        (["trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.sync_batchnorm=false"], 0),
    ],
)
def test_several_devices_are_trained_with_it(tmp_path, settings, plugins):
    cfg = compose("train", *settings, "logger=none")
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    assert trainer.world_size == 2
    module = nn.Sequential(nn.BatchNorm2d(2))
    sync = trainer.strategy._layer_sync
    assert (sync is not None) == bool(plugins)
    if sync is not None:
        assert isinstance(sync.apply(module)[0], SyncBatchNormCPU)


TWO = """
import sys
import torch
import torch.distributed as dist
from pem_lightning.training.distributed import SyncBatchNormCPU

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
for shape in ((5, 3), (5, 3, 4), (5, 3, 4, 2)):  # three images here, two there
    whole = torch.randn(shape, generator=generator) * 2 + 3
    weight = torch.randn(shape, generator=generator)
    for momentum in (0.1, None):
        alone = (torch.nn.BatchNorm1d if len(shape) < 4 else torch.nn.BatchNorm2d)(3, momentum=momentum)
        synced = SyncBatchNormCPU(3, momentum=momentum)
        parts = [whole.clone().requires_grad_(), whole.clone().requires_grad_()]
        mine = slice(0, 3) if rank == 0 else slice(3, 5)
        expected, actual = alone(parts[0]), synced(parts[1][mine])
        torch.testing.assert_close(actual, expected[mine])
        (expected * weight).sum().backward()
        (actual * weight[mine]).sum().backward()
        torch.testing.assert_close(parts[1].grad[mine], parts[0].grad[mine], rtol=1e-4, atol=1e-5)
        dist.all_reduce(synced.weight.grad)
        torch.testing.assert_close(synced.weight.grad, alone.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(synced.running_var, alone.running_var)
        torch.testing.assert_close(synced.running_mean, alone.running_mean)
        synced.eval(), alone.eval()
        torch.testing.assert_close(synced(whole), alone(whole))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_on_the_cpu_two_processes_are_one(tmp_path):
    """Shares of different sizes, in all dimensions; values, gradients and running statistics."""
    command = [sys.executable, "-c", TWO]
    root = Path(__file__).parents[1]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=root) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
