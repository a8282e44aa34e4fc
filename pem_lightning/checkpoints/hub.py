"""Folders to give away, and the Hugging Face Hub: weights and classes, a description for tools, a model card.

    model.safetensors   the network in float32; its header has classes and configuration, so that it works alone
    config.json         what the network is, for people and tools; nothing is read from it
    README.md           the model card

None of them has paths or accounts of the machine that trained.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pem_lightning.checkpoints.checkpoint import (
    CHECKPOINT_KEY,
    WEIGHTS,
    Checkpoint,
    parse_checkpoint,
    read_checkpoint,
    refuse_exported,
    shipped_file,
    slim_content,
)
from pem_lightning.checkpoints.safe_load import read_content, safetensors_bytes
from pem_lightning.files import write_file
from pem_lightning.installation import job_command
from pem_lightning.types import UserError

CONFIG, CARD = "config.json", "README.md"
LIBRARY = "pem-lightning"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_BUILT_OF = ("pem_lightning.models.", "pem_lightning.data.transforms.")
"""Modules whose classes and functions the network of a foreign file, and its resizing, may be built of."""


def load_pretrained(name: str | Path, revision: str | None = None, trust: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint in a folder, or else of a repository "user/name" of the Hub, from which it is downloaded.

    Args:
        name: whatever `read_checkpoint` takes, a folder of `save_pretrained`, or a repository.
        revision: branch, tag or commit of the repository.
        trust: packages besides this one whose code the network may be built of.

    Raises:
        UserError: there is nothing of that name, it cannot be had or read, or asks for other code.
    """
    path = shipped_file(Path(name).expanduser())
    if path.is_dir():
        raise UserError(f"{path} has no {WEIGHTS}: give a folder that save_pretrained() wrote")
    if not path.is_file() and _REPOSITORY.fullmatch(str(name)):
        path = _download(str(name), revision)
    checkpoint = read_checkpoint(path)
    for part in (checkpoint.config["network"], checkpoint.config["recipe"]["eval_transform"]):
        _check_targets(part, str(name), trust)
    return checkpoint


def _check_targets(node: Any, name: str, trust: Sequence[str]) -> None:
    """A configuration names what it is built of, and a foreign one could name anything that is installed."""
    from hydra.utils import get_object

    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if key != "_target_":
            _check_targets(value, name, trust)
            continue
        allowed = (*_BUILT_OF, *(f"{package}." for package in trust))
        home = ""
        if str(value).startswith(("pem_lightning.", *allowed)):
            home = f"{getattr(get_object(str(value)), '__module__', '')}."
        if not home.startswith(allowed):
            package = str(value).split(".")[0]
            raise UserError(
                f"{name} wants to be built of {value}, which is no part of PEM-Lightning: if you trust its author and "
                f"have that code, say trust=[{package!r}]"
            )


def save_pretrained(
    source: str | Path | Checkpoint,
    folder: str | Path,
    *,
    license: str | None = None,
    name: str | None = None,
    metrics: str | Path | Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of ours as a folder for others; a model card that is there already is kept.

    Args:
        source: path or name of a checkpoint, which may be slim; or one that was read, whose file is read again.
        folder: made if need be.
        license: by the Hub's names, e.g. "apache-2.0"; yours to choose, as far as the data's terms let you.
        name: of the repository, or any title.
        metrics: what evaluate.py wrote into metrics.json, or that file; by default the numbers of the validation at
            the checkpoint's step, from the checkpoint or the metrics.json of its run.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint or the metrics cannot be read, or the folder cannot be written.
    """
    path, folder = source.path if isinstance(source, Checkpoint) else shipped_file(source), Path(folder)
    refuse_exported(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give one that train.py wrote")
    content = read_content(path)
    if CHECKPOINT_KEY not in content:
        raise UserError(f"{path} was not written by train.py: give one of its .ckpt files")
    checkpoint = parse_checkpoint(path, content)
    if isinstance(source, Checkpoint) and source.step != checkpoint.step:
        raise UserError(f"{path} is of step {checkpoint.step} by now, and was of {source.step} when it was read")
    found = _metrics(checkpoint, content) if metrics is None else _given_metrics(metrics)
    slim = slim_content(checkpoint, public=True)
    if found is not None:
        slim[CHECKPOINT_KEY]["metrics"] = found
    public = checkpoint._replace(config=slim[CHECKPOINT_KEY]["config"], overrides=slim[CHECKPOINT_KEY]["overrides"])
    write_file(folder / WEIGHTS, safetensors_bytes(folder / WEIGHTS, slim))
    write_file(folder / CONFIG, json.dumps(_description(public), indent=2, ensure_ascii=False) + "\n")
    if not (folder / CARD).exists():
        write_file(folder / CARD, model_card(public, found, license, name))
    return folder


def push_to_hub(
    source: str | Path | Checkpoint,
    repository: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    **card: Any,
) -> str:
    """Upload what `save_pretrained` writes; the repository is made if need be, and a model card that it has is kept.

    Args:
        source: see `save_pretrained`.
        repository: "user/name".
        private: whether a new repository is; by default as the account has it.
        message: of the commit.
        card: `license` and `metrics` of `save_pretrained`.

    Returns:
        The repository's address.

    Raises:
        UserError: huggingface_hub is not installed, nobody is logged in, or the Hub cannot be reached or refuses.
    """
    hub = _import_hub(f"push_to_hub({repository!r})")
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository} is no name of a repository: give user/name")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(source, temporary, name=repository, **card)
        with _one_line(repository):
            url = hub.create_repo(repository, private=private, exist_ok=True)
            has_card = hub.file_exists(repository, CARD)
            hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message or "Upload by PEM-Lightning",
                ignore_patterns=[CARD] if has_card else None,
            )
    return str(url)


def _download(repository: str, revision: str | None) -> Path:
    hub = _import_hub(f"there is no folder {repository}, and downloading it from the Hugging Face Hub")
    with _one_line(repository):
        return Path(hub.hf_hub_download(repository, WEIGHTS, revision=revision, library_name=LIBRARY))


def _import_hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{what} needs the package huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """Say in one line what the Hub or the way to it refuses."""
    from huggingface_hub import errors

    login = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{repository} is gated: ask for access at its page on the Hub, and {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"there is no folder and no repository {repository}, or it is private: then {login}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no such revision: leave revision= out for its newest state") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repository} is not in the cache, and the Hub cannot be reached: check the network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{repository} has no {WEIGHTS}: it was not made by push_to_hub()") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"the Hub does not know who uploads {repository}: {login}") from error
    except Exception as error:  # of HTTP libraries, which differ between versions of huggingface_hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"the Hub refuses {repository} ({status}): {login}, with the right to write there"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{repository}: the Hub cannot be reached or refuses ({reason}): try again later") from error


def _metrics(checkpoint: Checkpoint, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers of the validation at a checkpoint's step, in the form of metrics.json."""
    from pem_lightning.metrics.evaluator import from_plain

    ours = content[CHECKPOINT_KEY]
    if "metrics" in ours:
        return ours["metrics"]
    state = content.get("callbacks", {}).get("ExactResume", {}).get("evaluation")
    if state is not None and ours.get("evaluated_step") == checkpoint.step:
        return from_plain(state).report(checkpoint.info, checkpoint.step)
    try:
        found = json.loads((checkpoint.path.parent.parent / "metrics.json").read_bytes())
        return found if found["step"] == checkpoint.step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _given_metrics(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(Path(given).read_bytes()) if isinstance(given, str | Path) else dict(given)
        if isinstance(found["per_class"], list) and any(key.startswith("val/") for key in found):
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"metrics={given} cannot be read ({error}): give a metrics.json of evaluate.py") from error
    raise UserError(f"metrics={given} has no numbers: give a metrics.json of evaluate.py")


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says."""
    config, names = checkpoint.config, checkpoint.info.class_names
    return {
        "model_type": "pem",
        "architectures": ["PEM"],
        "library_name": LIBRARY,
        "task": config["task"]["name"],
        "backbone": config.get("backbone", {}).get("name"),
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
        "network": config["network"],
        "resize": config["recipe"]["eval_transform"],
        "step": checkpoint.step,
    }


# The model card.


def model_card(
    checkpoint: Checkpoint, metrics: Mapping[str, Any] | None, license: str | None = None, name: str | None = None
) -> str:
    """README.md with the Hub's front matter.

    Args:
        checkpoint: without private paths.
        metrics: in the form of metrics.json.
        license, name: see `save_pretrained`.
    """
    config, info = checkpoint.config, checkpoint.info
    task, dataset = config["task"]["name"], config.get("dataset", {}).get("name") or info.name
    backbone = config.get("backbone", {}).get("name") or "a backbone"
    title = name.split("/")[-1] if name else f"PEM, {backbone}, {dataset}"
    front: dict[str, Any] = {
        "library_name": LIBRARY,
        "license": license or "unknown",
        "pipeline_tag": "image-segmentation",
        "tags": [f"{task}-segmentation", "pem", "pytorch"],
    }
    if metrics is not None:
        front["metrics"] = [_METRICS[key][0] for key in _METRICS if metrics.get(f"val/{key}") is not None]
        front["model-index"] = [_model_index(title, task, dataset, metrics)]
    where = name if name and _REPOSITORY.fullmatch(name) else "this/folder"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"{task.capitalize()} segmentation by [PEM](https://arxiv.org/abs/2402.19422) (Prototype-based Efficient "
        "MaskFormer, CVPR 2024), trained with PEM-Lightning.",
        f'```python\nfrom pem_lightning import Predictor\n\npredictor = Predictor.from_pretrained("{where}")\n'
        'result = predictor("photo.jpg")\nresult.save("out")\n```',
        _table(("", ""), _facts(checkpoint, backbone)),
        "## Classes",
        _table(
            ("index", "class", "kind", "id in the data set"),
            [(k, c.name, "thing" if c.is_thing else "stuff", c.category_id) for k, c in enumerate(info.classes)],
        ),
        "## Quality",
        _quality(dataset, metrics),
        "## Training",
        _training(checkpoint, dataset),
        "## Licence",
        f"The weights: {license}."
        if license
        else "Nobody has chosen one yet: ask the author before you use the weights.",
        "## Limits",
        "The network knows what its training images show. How good it is on images of other places, cameras or weather "
        "was not measured.",
    ]
    return "\n\n".join(parts) + "\n"


_METRICS = {
    "PQ": ("panoptic_quality", "PQ"),
    "mIoU": ("mean_iou", "mean IoU"),
    "pixel_accuracy": ("accuracy", "pixel accuracy"),
    "AP": ("average_precision", "AP"),
    "AP50": ("average_precision_50", "AP50"),
}
"""Numbers of metrics.json without "val/" -> the Hub's type, and what people call it."""


def _model_index(title: str, task: str, dataset: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: metrics.get(f"val/{key}") for key in _METRICS}
    return {
        "name": title,
        "results": [
            {
                "task": {"type": "image-segmentation", "name": f"{task.capitalize()} segmentation"},
                "dataset": {"name": dataset, "type": dataset, "split": "validation"},
                "metrics": [
                    {"type": _METRICS[key][0], "value": round(value, 2), "name": f"{_METRICS[key][1]} (percent)"}
                    for key, value in found.items()
                    if value is not None
                ],
            }
        ],
    }


def _facts(checkpoint: Checkpoint, backbone: str) -> list[tuple[str, str]]:
    config = checkpoint.config
    network, resize = config["network"], config["recipe"]["eval_transform"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    weights = sum(value.numel() for key, value in checkpoint.network.items() if not key.endswith(buffers))
    size = "RGB images of any size"
    if edge := resize.get("shortest_edge"):
        size += f", whose shorter side is brought to {edge} pixels"
    queries, layers = network.get("num_queries"), network.get("num_layers")
    return [
        ("network", f"PEM with {backbone}, {queries} queries, {layers} decoder layers; {weights / 1e6:.2f} M weights"),
        ("task", config["task"]["name"]),
        ("input", size),
        ("trained for", f"{checkpoint.step} steps"),
    ]


def _quality(dataset: str, metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return (
            f"No numbers are stored with this network: `{job_command('evaluate')} checkpoint=this/folder` measures it."
        )
    headline = [(_METRICS[key][1], _cell(metrics.get(f"val/{key}"))) for key in _METRICS if f"val/{key}" in metrics]
    rows = metrics["per_class"]
    columns = [key for key in (rows[0] if rows else {}) if key not in ("kind", "TP", "FP", "FN", "objects")]
    return "\n\n".join(
        [
            f"Of the validation images of `{dataset}`, in percent.",
            _table(("", ""), headline),
            _table(columns, [[_cell(row[key]) for key in columns] for row in rows]),
        ]
    )


def _training(checkpoint: Checkpoint, dataset: str) -> str:
    config, recipe = checkpoint.config, checkpoint.config["recipe"]
    crop = recipe.get("train_transform", {}).get("crop_size")
    facts = {
        "data": f"`{dataset}`",
        "images of a step": recipe.get("global_batch_size"),
        "crop, pixels": None if crop is None else " x ".join(map(str, crop)),
        "steps of the recipe": recipe.get("max_steps"),
        "learning rate": recipe.get("optimizer", {}).get("lr"),
        "started from": config.get("weights"),
        "seed": config.get("seed"),
    }
    table = _table(("", ""), [(key, value) for key, value in facts.items() if value is not None])
    command = shlex.join([*job_command("train").split(), *checkpoint.overrides])
    return f"{table}\n\n```\n{command}\n```"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown; columns of numbers are on the right."""
    columns = [[str(row[i]) for row in rows] for i in range(len(header))]
    marks = ["--:" if all(re.fullmatch(r"-|[\d.]+", text) for text in column) else "---" for column in columns]
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(str(v).replace("|", r"\|") for v in line) + " |" for line in lines)
