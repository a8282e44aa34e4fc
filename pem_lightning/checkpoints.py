"""Reading checkpoints: our own, and those of the PEM authors.

Nothing is dropped in silence: keys that nobody claims and parameters that nobody fills are reported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.networks.pem import build_pem
from pem_lightning.types import DatasetInfo

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "pem_lightning"
"""Where a Lightning checkpoint keeps what is ours."""

_NETWORK_PREFIX = "network."


class Checkpoint(NamedTuple):
    """One of our checkpoints, as far as evaluation and prediction need it.

    Attributes:
        path: where it was read from.
        step: how long it was trained.
        config: the composed experiment.
        overrides: the command line's part of it.
        info: the classes it knows.
        network: weights, by the network's own names.
    """

    path: Path
    step: int
    config: dict[str, Any]
    overrides: list[str]
    info: DatasetInfo
    network: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that train.py wrote. Only plain data is unpickled, so a foreign file can do no harm.

    Raises:
        UserError: the file is missing, damaged, or not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: train.py writes them to outputs/<experiment>/checkpoints")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = content[CHECKPOINT_KEY]
        state = content["state_dict"]
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        raise UserError(f"{path} is damaged or was not written by train.py: give one of its .ckpt files") from error
    return Checkpoint(
        path=path,
        step=content["global_step"],
        config=ours["config"],
        overrides=ours["overrides"],
        info=DatasetInfo.from_dict(ours["dataset_info"]),
        network={k.removeprefix(_NETWORK_PREFIX): v for k, v in state.items() if k.startswith(_NETWORK_PREFIX)},
    )


def load_network(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights, all of them.

    Raises:
        UserError: they do not fit the network.
    """
    check_fits(network, checkpoint)
    network.load_state_dict(checkpoint.network, strict=True)


def check_fits(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare names and shapes.

    Raises:
        UserError: some differ; the message names the first.
    """
    wanted, given = network.state_dict(), checkpoint.network
    problems = [f"{k} is missing" for k in wanted if k not in given]
    problems += [f"{k} is not known" for k in given if k not in wanted]
    problems += [
        f"{k} has shape {list(given[k].shape)} instead of {list(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    if problems:
        raise UserError(
            f"{checkpoint.path} does not fit the network ({problems[0]}; {len(problems)} differences): "
            "use the backbone, network and data set it was trained with"
        )


_PYRAMID = r"sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"sem_seg_head\.predictor\."
_LAYER = r"transformer_decoder.layers.\1."

# The authors list the pyramid's inputs from fine to coarse, but its CSM and deformable layers from coarse to fine; ours
# all run from coarse to fine, hence the reversed index of the laterals.
_RENAMES: tuple[tuple[str, Any], ...] = (
    (r"backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"backbone\.stem\.conv1\.", "backbone.conv1."),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}."),
    (r"backbone\.features\.", "backbone.features."),
    (_PYRAMID + r"in_projections\.(\d)\.", lambda m: f"pixel_decoder.laterals.{3 - int(m[1])}."),
    (_PYRAMID + r"conv_avg\.", "pixel_decoder.global_context."),
    (_PYRAMID + r"csm\.(\d)\.mlp\.0\.mlp\.", r"pixel_decoder.csm.\1.mlp."),
    (_PYRAMID + r"dcn\.(\d)\.dcn_offset\.", r"pixel_decoder.upsampling.\1.deform.offset."),
    (_PYRAMID + r"dcn\.(\d)\.dcn\.", r"pixel_decoder.upsampling.\1.deform."),
    (_PYRAMID + r"dcn\.(\d)\.dcn_bn\.", r"pixel_decoder.upsampling.\1.deform_norm."),
    (_PYRAMID + r"dcn\.(\d)\.up_sample\.", r"pixel_decoder.upsampling.\1.upsample."),
    (_PYRAMID + r"dcn\.(\d)\.up_bn\.", r"pixel_decoder.upsampling.\1.upsample_norm."),
    (_PYRAMID + r"out\.", "pixel_decoder.mask_projection."),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d)\.self_attn\.", _LAYER + "self_attention.attention."),
    (_PREDICTOR + r"transformer_self_attention_layers\.(\d)\.norm\.", _LAYER + "self_attention.norm."),
    (_PREDICTOR + r"transformer_ffn_layers\.(\d)\.", _LAYER + "feed_forward."),
    # feature_proj and query_proj are called to_query and to_key in the authors' older checkpoints.
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.(?:feature_proj|to_query)\.to_query_3x3\.",
        _LAYER + "cross_attention.feature_conv.",
    ),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.(?:feature_proj|to_query)\.bn\.",
        _LAYER + "cross_attention.feature_norm.",
    ),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.(?:feature_proj|to_query)\.out\.",
        _LAYER + "cross_attention.feature_linear.",
    ),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.(?:query_proj|to_key)\.0\.",
        _LAYER + "cross_attention.query_norm.",
    ),
    (
        _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.(?:query_proj|to_key)\.1\.",
        _LAYER + "cross_attention.query_linear.",
    ),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.proj\.", _LAYER + "cross_attention.interaction."),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.final\.", _LAYER + "cross_attention.output."),
    (_PREDICTOR + r"transformer_cross_attention_layers\.(\d)\.alpha", _LAYER + "cross_attention.alpha"),
    (_PREDICTOR + r"decoder_norm\.", "transformer_decoder.norm."),
    (_PREDICTOR + r"(?:query_feat|static_query)\.", "transformer_decoder.query_features."),
    (_PREDICTOR + r"query_embed\.", "transformer_decoder.query_positions."),
    (_PREDICTOR + r"level_embed\.", "transformer_decoder.level_embedding."),
    (_PREDICTOR + r"input_proj\.", "transformer_decoder.input_projections."),
    (_PREDICTOR + r"class_embed\.", "transformer_decoder.class_head."),
    (_PREDICTOR + r"mask_embed\.", "transformer_decoder.mask_head."),
)

_NOT_WEIGHTS = re.compile(
    r"criterion\.empty_weight|pixel_(mean|std)"  # constants of the authors' meta architecture
    r"|backbone\.x(2|4|8|16|32)\..*"  # their STDC registers every stage twice
)


def rename_official_key(key: str) -> str | None:
    """Translate one parameter name of the authors' code to ours; None where it has no counterpart."""
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn("^" + pattern, replacement, key)
        if count:
            return renamed
    return None


def from_official(official_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate a state dict of the authors' implementation into ours.

    Leftover keys and missing parameters are reported as warnings of the logger `pem_lightning.checkpoints`; loading the
    result with `strict=True` then decides.

    Args:
        official_state: the authors' state dict (arrays or tensors), or their checkpoint with the entry `model`.

    Returns:
        A state dict for `build_pem` with the same backbone, classes, queries and layers.

    Raises:
        UserError: nothing in it looks like PEM.
    """
    if isinstance(official_state.get("model"), Mapping):
        official_state = official_state["model"]
    state: dict[str, Tensor] = {}
    leftovers = []
    for key, value in official_state.items():
        renamed = rename_official_key(key)
        if renamed is not None:
            state[renamed] = torch.as_tensor(value)
        elif not _NOT_WEIGHTS.fullmatch(key):
            leftovers.append(key)
    if "transformer_decoder.class_head.weight" not in state:
        raise UserError("this is no checkpoint of the PEM authors' code: no key starts with sem_seg_head.predictor.")
    _fill_batch_counters(state)
    expected = _expected_keys(state)
    for what, keys in (("no counterpart for", leftovers), ("no value for", sorted(expected - state.keys()))):
        if keys:
            log.warning("from_official: %s %d keys: %s", what, len(keys), ", ".join(keys))
    return state


def _fill_batch_counters(state: dict[str, Tensor]) -> None:
    """Frozen batch normalisation has no batch counter in detectron2; evaluation does not need its value."""
    for key in [k for k in state if k.endswith(".running_mean")]:
        state.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


def _expected_keys(state: Mapping[str, Tensor]) -> set[str]:
    """The keys of the network that the state dict's shapes describe."""
    layers = {match[1] for key in state if (match := re.match(r"transformer_decoder\.layers\.(\d+)\.", key))}
    with torch.device("meta"):
        model = build_pem(
            _guess_backbone(state),
            num_classes=len(state["transformer_decoder.class_head.weight"]) - 1,
            num_queries=len(state["transformer_decoder.query_features.weight"]),
            num_layers=len(layers),
        )
    return set(model.state_dict())


def _guess_backbone(state: Mapping[str, Tensor]) -> str:
    if any(key.startswith("backbone.features.") for key in state):
        return "stdc2" if any(key.startswith("backbone.features.13.") for key in state) else "stdc1"
    blocks = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depths = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}
    return f"resnet{depths.get((bottleneck, blocks), 50)}"
