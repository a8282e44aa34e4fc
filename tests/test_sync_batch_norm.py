from hydra.utils import instantiate
from torch import nn

from pem_lightning.build import build_trainer
from pem_lightning.networks.layers import FrozenBatchNorm2d
from pem_lightning.sync_batch_norm import PlainSyncBatchNorm
from tests.test_config import compose


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_plain_layers_are_synchronised_and_their_subclasses_are_not():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(3)), FrozenBatchNorm2d(4), NormAct(5))
    weight = network[0].weight
    synced = PlainSyncBatchNorm().apply(network)
    assert synced is network
    kinds = [type(m).__name__ for m in network.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == ["SyncBatchNorm", "SyncBatchNorm", "FrozenBatchNorm2d", "NormAct"]
    assert network[0].weight is weight
    back = PlainSyncBatchNorm().revert(network)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in back.modules())


def test_several_gpus_are_trained_with_it(tmp_path):
    cfg = compose("train", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none")
    cfg.output_dir = str(tmp_path)
    assert build_trainer(cfg).world_size == 2
    assert [type(plugin) for plugin in instantiate(cfg.trainer.plugins)] == [PlainSyncBatchNorm]
