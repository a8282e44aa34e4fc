"""Starting a network from weights of one's own or of others', and converting them."""

from __future__ import annotations

import difflib
import http.client
import io
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from pem_lightning.checkpoints.checkpoint import CHECKPOINT_KEY, as_tensor, parse_checkpoint, read_content
from pem_lightning.files import write_file
from pem_lightning.models.backbones import build_backbone
from pem_lightning.models.pem import build_pem
from pem_lightning.types import DatasetInfo, UserError


def read_weights(source: str | Path) -> Weights:
    """Read weights of whatever kind is accepted (see docs/training.md), by our names.

    Args:
        source: a file, or one of the names in `DOWNLOADS`.

    Raises:
        UserError: they do not exist, cannot be had, are damaged, dangerous or of no known kind.
    """
    path = Path(source)
    if path.is_file():
        return recognize(read_content(path), str(source))
    if str(source) in DOWNLOADS:
        return recognize(download(str(source)), str(source))
    if re.fullmatch(r"[\w-]+/[\w-]+", str(source)):  # no suffix: meant as a name
        raise unknown_name(str(source))
    raise UserError(f"weights={source} does not exist: give a file or one of the names {', '.join(DOWNLOADS)}")


def load_weights(network: nn.Module, source: str | Path, info: DatasetInfo | None = None) -> LoadReport:
    """Start a freshly made network from published weights or a checkpoint; what they lack stays as it is.

    Args:
        network: `PEM` with random weights.
        source: a file, or one of the names in `DOWNLOADS`.
        info: the classes it is for. A checkpoint of ours with other ones leaves the class head random.

    Returns:
        What was taken over and what was not; `show_report` prints it.

    Raises:
        UserError: see `read_weights`; or the backbone is not covered completely, and the network is left as it was.
    """
    weights = read_weights(source)
    state = network.state_dict()
    report = compare(state, weights, None if info is None else info.class_names)
    report.check_backbone()
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(weights.state[name])
    return report


def convert_weights(source: str | Path, target: Path, backbone: str | None = None) -> LoadReport:
    """Write weights under our names as a plain file of tensors that `load_weights` reads.

    Args:
        source: a file, or one of the names in `DOWNLOADS`.
        target: a file of torch.save is written there. If the backbone is not covered, none is.
        backbone: what they are meant for; None takes the one that they look like.

    Returns:
        What was written (`loaded`) and what was not. `check_backbone` decides whether it was.

    Raises:
        UserError: see `read_weights`; or the backbone is unknown, or the file cannot be written.
    """
    weights = read_weights(source)
    report = compare(_expected(weights, backbone), weights)
    if not report.gaps():
        buffer = io.BytesIO()
        torch.save({name: weights.state[name].clone() for name in report.loaded}, buffer)
        write_file(target, buffer.getvalue())
    return report


def _expected(weights: Weights, backbone: str | None) -> dict[str, Tensor]:
    """The names and shapes that weights should have: PEM's if there are some of its decoder, else the backbone's."""
    name = backbone or guess_backbone(weights.state)
    if f"{CLASS_HEAD}weight" in weights.state and not weights.ours:
        return describe_network(weights.state, name)
    expected = dict(weights.state) if weights.ours else {}
    if name is None and not expected:
        raise UserError(f"weights={weights.source} ({weights.kind}) are those of no backbone here: say --backbone NAME")
    if name is not None:
        with torch.device("meta"):
            own = build_backbone(name).state_dict()
        expected = {key: value for key, value in expected.items() if not key.startswith("backbone.")}
        expected |= {f"backbone.{key}": value for key, value in own.items()}
    return expected


log = logging.getLogger(__name__)

CLASS_HEAD = "transformer_decoder.class_head."
_COUNTER = "num_batches_tracked"
"""Batch normalisation's counter: frozen ones and old files have none, and nothing depends on it."""

_SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """A comparison of weights with a network.

    Attributes:
        source: path or name of the weights.
        kind: whose format they have.
        loaded: names that the network takes over.
        reinitialized: the class head, where classes differ; it stays random.
        missing: names of the network that the file lacks; they stay random.
        mismatched: names that have another shape, with the file's and the network's; they stay random.
        unexpected: names of the file that the network has not.
        hint: what else to try if the backbone is not covered.
    """

    source: str
    kind: str
    loaded: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    hint: str = ""

    def rows(self) -> dict[str, list[str]]:
        """What there is to tell -> names; mismatched ones with their shapes."""
        shapes = [f"{name} {given} for {wanted}" for name, (given, wanted) in self.mismatched.items()]
        rows = {
            "loaded": self.loaded,
            "class head, re-initialised": self.reinitialized,
            "missing, stay random": self.missing,
            "other shape, stay random": shapes,
            "unexpected, not used": self.unexpected,
        }
        return {what: names for what, names in rows.items() if names or what == "loaded"}

    def gaps(self) -> list[str]:
        """What the backbone lacks of its parameters and statistics, in words."""
        gaps = [f"{name} is missing" for name in self.missing if name.startswith("backbone.")]
        return gaps + [
            f"{name} has shape {given} instead of {wanted}"
            for name, (given, wanted) in self.mismatched.items()
            if name.startswith("backbone.")
        ]

    def check_backbone(self) -> None:
        """Make sure that the backbone gets all its parameters and statistics.

        Raises:
            UserError: it does not.
        """
        if gaps := self.gaps():
            which = f"{gaps[0]}; {len(gaps)} differences"
            raise UserError(f"weights={self.source} ({self.kind}) does not cover the backbone ({which}): {self.hint}")


def compare(wanted: Mapping[str, Tensor], weights: Weights, classes: Sequence[str] | None = None) -> LoadReport:
    """Sort all names.

    Args:
        wanted: the network's state dict.
        weights: the file's.
        classes: names of the classes that the network is for; with others the class head is not taken over.
    """
    given = weights.state
    other_shape = {
        name: (list(given[name].shape), list(tensor.shape))
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    head = [name for name in wanted if name.startswith(CLASS_HEAD) and name in given]
    other_classes = None not in (classes, weights.classes) and tuple(classes or ()) != weights.classes
    reinitialized = head if other_classes or any(name in other_shape for name in head) else []
    return LoadReport(
        source=weights.source,
        kind=weights.kind,
        loaded=[name for name in wanted if name in given and name not in (*other_shape, *reinitialized)],
        reinitialized=reinitialized,
        missing=[name for name in wanted if name not in given and not name.endswith(_COUNTER)],
        mismatched={name: shapes for name, shapes in other_shape.items() if name not in reinitialized},
        unexpected=[*(name for name in given if name not in wanted), *weights.leftovers],
        hint=_hint(wanted, given),
    )


def _hint(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    if any(name.startswith("backbone.model.") for name in wanted):
        return "backbone=timm takes files of timm's with backbone.pretrained=FILE"
    name = guess_backbone(given)
    if name is None or name == guess_backbone(wanted):
        return "give the whole weights of the backbone that is chosen"
    return f"it looks like {name}, choose backbone={name} or other weights"


def show_report(report: LoadReport, console: Console | None = None) -> None:
    """Print the table, or log a line per row if nobody sits at a terminal. All names are in the log at level DEBUG."""
    console = console or Console()
    counts = "; ".join(f"{what}: {len(names)}" for what, names in report.rows().items())
    log.info("weights from %s (%s): %s", report.source, report.kind, counts)
    if console.is_terminal:
        console.print(report_table(report))
    else:
        for what, names in report.rows().items():
            log.info("%s: %d (%s)", what, len(names), summarize(names))
    for what, names in report.rows().items():
        for name in names:
            log.debug("%s: %s", what, name)


def report_table(report: LoadReport) -> Table:
    """One row per fate."""
    table = Table("weights", title=f"{escape(report.source)}: {escape(report.kind)}", header_style="bold")
    table.add_column("number", justify="right")
    table.add_column("which")
    for what, names in report.rows().items():
        table.add_row(what, str(len(names)), escape(summarize(names)))
    return table


def summarize(names: Sequence[str]) -> str:
    """A few names, or the parts of the network that many names belong to, with their numbers."""
    if len(names) <= _SHOWN:
        return ", ".join(names) or "none"
    parts = Counter(name.split(".")[0] for name in names)
    if any("[" in name for name in names) or len(parts) == len(names):
        return ", ".join([*names[:_SHOWN], "..."])
    first = {part: next(name for name in names if name.split(".")[0] == part) for part in parts}
    texts = [first[part] if number == 1 else f"{part}.* {number}" for part, number in parts.items()]
    return ", ".join([*texts[:8], *(["..."] if len(texts) > 8 else [])])


_TORCHVISION = "https://download.pytorch.org/models/"

DOWNLOADS: dict[str, str] = {
    "torchvision/resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "torchvision/resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "torchvision/resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "torchvision/resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "torchvision/resnet50_v2": _TORCHVISION + "resnet50-11ad3fa6.pth",
    "torchvision/resnet101_v2": _TORCHVISION + "resnet101-cd907fc2.pth",
}
"""What can be had by name: torchvision's IMAGENET1K_V1, and _v2 for those of its newer recipe (IMAGENET1K_V2)."""


def download(name: str) -> Mapping[Any, Any]:
    """Fetch weights into the cache of torch.hub, unless they are there, and read them.

    Args:
        name: one of `DOWNLOADS`.

    Raises:
        UserError: they cannot be had, or are not what the hash says.
    """
    url = DOWNLOADS[name]
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=True, check_hash=True, weights_only=True
        )
    except (OSError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"weights={name} cannot be downloaded ({reason}): download {url} elsewhere and say weights=FILE"
        ) from error
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        if "invalid hash" in str(error):
            raise UserError(
                f"weights={name}: what came from {url} has another hash than its name says: try again, or download it "
                "elsewhere and say weights=FILE"
            ) from error
        file = f"{torch.hub.get_dir()}/checkpoints/{url.rsplit('/', 1)[1]}"
        raise UserError(f"weights={name} is damaged in the cache: delete {file} and try again") from error


def unknown_name(source: str) -> UserError:
    """The error for what is neither a file nor a name."""
    close = difflib.get_close_matches(source, DOWNLOADS, n=1)
    hint = f"did you mean {close[0]}?" if close else "see docs/training.md for what is accepted"
    return UserError(f"weights={source} is no file and none of the names {', '.join(DOWNLOADS)}: {hint}")


_CAFFE2_NAME = re.compile(r"(res\d_\d+_branch\w+|conv1|res_conv1_bn)_[wbs]")
_OWN_NAME = re.compile(r"(pixel_decoder|transformer_decoder|backbone\.(conv1|bn1|layer\d|features|model))\.")
_DETECTRON2_NAME = re.compile(r"(stem\.conv1|res[2-5]\.\d+\.\w+)\.")
_RESNET_NAME = re.compile(r"(conv1|bn1|layer[1-4])\.")


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        source: its path or name.
        kind: whose format it is.
        state: weights by our network's names.
        leftovers: names of the file that have no counterpart.
        classes: the classes that the class head knows, where the file says so.
        ours: whether the names were ours as they are.
    """

    source: str
    kind: str
    state: dict[str, Tensor]
    leftovers: list[str]
    classes: tuple[str, ...] | None = None
    ours: bool = False


def recognize(content: Mapping[Any, Any], source: str) -> Weights:
    """Find out whose weights these are and rename them.

    Args:
        content: what the file holds.
        source: its path or name, for messages.

    Raises:
        UserError: nobody's whose names are known, or weights that no backbone here can use.
    """
    if CHECKPOINT_KEY in content:
        return _own(content, source)
    state, others = _tensors(content)
    if content.get("__author__") == "Caffe2" or any(_CAFFE2_NAME.fullmatch(key) for key in state):
        raise UserError(
            f"weights={source} is one of Caffe2's (MSRA) models: they take BGR images, not divided by the deviation, "
            "and have the stride in another convolution: take torchvision's instead, e.g. weights=torchvision/resnet50"
        )
    if any(key.startswith("sem_seg_head.") for key in state):
        kind, (renamed, leftovers) = "PEM authors", translate_official(state)
    elif any(_OWN_NAME.match(key) for key in state):
        kind, renamed, leftovers = "PEM-Lightning", state, []
    elif any(_DETECTRON2_NAME.match(key) for key in state):
        kind, (renamed, leftovers) = "detectron2 ResNet", _detectron2(state)
    elif "features.0.conv.weight" in state:
        kind, (renamed, leftovers) = "STDC authors", _backbone(state, re.compile(r"features\."))
    elif any(_RESNET_NAME.match(key) for key in state):
        kind, (renamed, leftovers) = "torchvision or timm ResNet", _backbone(state, _RESNET_NAME)
    else:
        names = ", ".join([*state, *others][:3]) or "nothing"
        raise UserError(
            f"weights={source} is of no known kind (it holds {names}, ...): docs/training.md says what is accepted"
        )
    return Weights(source, kind, renamed, leftovers + others, ours=kind == "PEM-Lightning")


def _own(content: Mapping[Any, Any], source: str) -> Weights:
    try:
        checkpoint = parse_checkpoint(Path(source), content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"weights={source} lacks what train.py writes into a checkpoint: give another") from error
    kind = f"PEM-Lightning, step {checkpoint.step} on {checkpoint.info.name}"
    return Weights(source, kind, checkpoint.network, [], tuple(checkpoint.info.class_names), ours=True)


def _tensors(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, of whatever they are wrapped in, and the names of what is none."""
    for wrapping in ("model", "state_dict", "blobs"):
        if isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    values = {str(key): as_tensor(value) for key, value in content.items()}
    tensors = {key: value for key, value in values.items() if value is not None}
    others = [key for key, value in values.items() if value is None and not key.startswith("__")]
    if tensors and all(key.startswith("module.") for key in tensors):  # of nn.DataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    for key in [key for key, value in tensors.items() if key.endswith("num_batches_tracked") and value.numel() == 1]:
        tensors[key] = tensors[key].reshape(())  # some files have it as a vector
    return tensors, others


def _detectron2(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Detectron2's names of a backbone alone are those of the PEM authors' without the prefix."""
    renamed = {key: rename_official_key(f"backbone.{key}") for key in state}
    return {ours: state[k] for k, ours in renamed.items() if ours}, [k for k, ours in renamed.items() if not ours]


def _backbone(state: Mapping[str, Tensor], claimed: re.Pattern[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Names that are ours as they are."""
    renamed = {f"backbone.{key}": value for key, value in state.items() if claimed.match(key)}
    return renamed, [key for key in state if not claimed.match(key)]


# Checkpoints of the PEM authors: their parameter names in ours.
#
# Nothing is dropped in silence: keys that nobody claims and parameters that nobody fills are reported.


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
