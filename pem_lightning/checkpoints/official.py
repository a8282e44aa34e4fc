"""Checkpoints of the PEM authors: their parameter names in ours.

Nothing is dropped in silence: keys that nobody claims and parameters that nobody fills are reported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pem_lightning.errors import UserError
from pem_lightning.networks.pem import build_pem

log = logging.getLogger(__name__)

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


def translate_official(official_state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rename what has a counterpart.

    Returns:
        Weights by our names, and the names of what is left, constants and stages that are there twice included.
    """
    renamed = {key: rename_official_key(key) for key in official_state}
    state = {ours: official_state[key] for key, ours in renamed.items() if ours is not None}
    return state, [key for key, ours in renamed.items() if ours is None]


def from_official(official_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate a state dict of the authors' implementation into ours.

    Leftover keys and missing parameters are reported as warnings of this module's logger; loading the result with
    `strict=True` then decides. `load_weights` starts a network from a file of theirs, whole or in part.

    Args:
        official_state: the authors' state dict (arrays or tensors), or their checkpoint with the entry `model`.

    Returns:
        A state dict for `build_pem` with the same backbone, classes, queries and layers.

    Raises:
        UserError: nothing in it looks like PEM.
    """
    if isinstance(official_state.get("model"), Mapping):
        official_state = official_state["model"]
    weights = {k: v for k, v in official_state.items() if not _NOT_WEIGHTS.fullmatch(k)}
    renamed, leftovers = translate_official(weights)
    state = {key: torch.as_tensor(value) for key, value in renamed.items()}
    if "transformer_decoder.class_head.weight" not in state:
        raise UserError("this is no checkpoint of the PEM authors' code: no key starts with sem_seg_head.predictor.")
    _fill_batch_counters(state)
    expected = describe_network(state).keys()
    for what, keys in (("no counterpart for", leftovers), ("no value for", sorted(expected - state.keys()))):
        if keys:
            log.warning("from_official: %s %d keys: %s", what, len(keys), ", ".join(keys))
    return state


def _fill_batch_counters(state: dict[str, Tensor]) -> None:
    """Frozen batch normalisation has no batch counter in detectron2; evaluation does not need its value."""
    for key in [k for k in state if k.endswith(".running_mean")]:
        state.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


def describe_network(state: Mapping[str, Tensor], backbone: str | None = None) -> dict[str, Tensor]:
    """What the network that weights belong to needs, concluded from their shapes.

    Args:
        state: weights by our names, those of the class head among them.
        backbone: its name; None concludes it, too.

    Returns:
        A state dict of tensors on the meta device: names and shapes.
    """
    layers = {match[1] for key in state if (match := re.match(r"transformer_decoder\.layers\.(\d+)\.", key))}
    queries = state.get("transformer_decoder.query_features.weight")
    with torch.device("meta"):
        model = build_pem(
            backbone or guess_backbone(state) or "resnet50",
            num_classes=len(state["transformer_decoder.class_head.weight"]) - 1,
            num_layers=len(layers) or 6,
            num_queries=100 if queries is None else len(queries),
        )
    return model.state_dict()


def guess_backbone(state: Mapping[str, Tensor]) -> str | None:
    """The name of the backbone that weights by our names belong to; None if it is none of ours."""
    if any(key.startswith("backbone.features.") for key in state):
        return "stdc2" if any(key.startswith("backbone.features.13.") for key in state) else "stdc1"
    blocks = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depths = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}
    return f"resnet{depths[bottleneck, blocks]}" if (bottleneck, blocks) in depths else None
