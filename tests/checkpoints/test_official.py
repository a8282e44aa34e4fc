import logging

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.checkpoints import from_official, rename_official_key
from pem_lightning.types import UserError


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
