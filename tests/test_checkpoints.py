import logging

import pytest
import torch

from pem_lightning import build_pem, checkpoints
from pem_lightning.checkpoints import from_official, read_checkpoint, rename_official_key
from pem_lightning.errors import UserError


@pytest.fixture(scope="module")
def official(official_weights):
    return official_weights("city_pan_stdc1", seed=1)


def test_every_weight_of_the_authors_is_used_once(official, caplog):
    state = from_official(official)
    assert caplog.records == []
    build_pem("stdc1", num_classes=19).load_state_dict(state, strict=True)
    claimed = [rename_official_key(key) for key in official]
    claimed = [key for key in claimed if key is not None]
    assert len(claimed) == len(set(claimed)) == len(state)


def test_takes_detectron2s_wrapping_and_numpy(official):
    wrapped = {"model": {key: value.numpy() for key, value in official.items()}, "iteration": 3}
    assert from_official(wrapped).keys() == from_official(official).keys()


def test_takes_the_older_names(official):
    def older(key):
        return (
            key.replace("feature_proj", "to_query")
            .replace("query_proj", "to_key")
            .replace("query_feat", "static_query")
        )

    renamed = {older(key): value for key, value in official.items()}
    assert renamed.keys() != official.keys()
    assert from_official(renamed).keys() == from_official(official).keys()


def test_leftovers_and_gaps_are_reported(official, caplog):
    state = dict(official)
    del state["sem_seg_head.predictor.level_embed.weight"]
    state["sem_seg_head.predictor.surprise"] = torch.zeros(1)
    with caplog.at_level(logging.WARNING):
        from_official(state)
    messages = [record.getMessage() for record in caplog.records]
    assert any("no counterpart" in m and "predictor.surprise" in m for m in messages)
    assert any("no value" in m and "transformer_decoder.level_embedding.weight" in m for m in messages)


def test_frozen_norms_lack_a_counter_and_load_all_the_same(official):
    without = {k: v for k, v in official.items() if not k.endswith("num_batches_tracked")}
    build_pem("stdc1", num_classes=19).load_state_dict(from_official(without), strict=True)


def test_something_else_is_refused():
    with pytest.raises(UserError, match="no checkpoint of the PEM authors"):
        from_official({"fc.weight": torch.zeros(2)})


def write(path, network):
    info = {"name": "toy", "classes": [{"name": "a", "color": [1, 2, 3], "is_thing": True, "official_id": 7}]}
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        "global_step": 12,
        checkpoints.CHECKPOINT_KEY: {"config": {"a": 1}, "overrides": ["seed=3"], "dataset_info": info},
    }
    torch.save(content, path)


def test_our_own_round_trip(tmp_path):
    network = build_pem("resnet18", num_classes=1, num_layers=1)
    write(tmp_path / "a.ckpt", network)
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert (checkpoint.step, checkpoint.config, checkpoint.overrides) == (12, {"a": 1}, ["seed=3"])
    assert checkpoint.info.classes[0].color == (1, 2, 3)
    assert checkpoint.info.thing_classes == {0}
    other = build_pem("resnet18", num_classes=1, num_layers=1)
    checkpoints.load_network(other, checkpoint)
    assert torch.equal(other.backbone.conv1.weight, network.backbone.conv1.weight)


@pytest.mark.parametrize("change", [{"num_classes": 2}, {"num_layers": 2}, {"backbone": "resnet34"}])
def test_a_checkpoint_that_does_not_fit_is_named_with_the_cure(tmp_path, change):
    write(tmp_path / "a.ckpt", build_pem("resnet18", num_classes=1, num_layers=1))
    other = build_pem(**{"backbone": "resnet18", "num_classes": 1, "num_layers": 1, **change})
    with pytest.raises(UserError, match=r"a\.ckpt does not fit .* differences\): use the backbone"):
        checkpoints.load_network(other, read_checkpoint(tmp_path / "a.ckpt"))


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_damaged_and_foreign_files_are_refused(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(path)
    write(path, build_pem("resnet18", num_classes=1, num_layers=1))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a\.ckpt is damaged"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "evil": Malicious()}, path)
    with pytest.raises(UserError, match="not written by train"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
