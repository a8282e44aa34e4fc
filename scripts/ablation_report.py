"""Makes a report of training runs: what every variant of the network reaches and costs, as tables and figures.

    python scripts/ablation_report.py RUNS... [--output report] [--size 1024x2048] [--rounds 5] [--no-latency]

RUNS are folders of train.py's runs, or folders that hold some at any depth, finished or not. Writes report.html (one
file, opens anywhere), report.md, report.csv and the figures. Exit code 0: done, 2: wrong usage, or no run was found.

A variant is named after its run's overrides (`ablation=no_csm`, `decoder_layers=3`) and compared within a setting: the
same data, task, steps, batch, crops and evaluation. Runs of one variant differ in their seed only.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.types import UserError

DEFAULT = "PEM"  # the unchanged network
NAMES = {
    "ablation=prototype": "",
    "ablation=no_csm": "no CSM",
    "ablation=fpn": "FPN",
    "ablation=msdeform": "MSDeformAttn",
    "ablation=cross_attention": "cross-attention",
    "ablation=masked_cross_attention": "masked cross-attention",
    "decoder_layers=1": "1 layer",
    "decoder_layers=6": "",
}
"""Overrides whose name is not made by rule; an empty one is the unchanged network's."""
IGNORED = re.compile(
    r"(seed|task|dataset|recipe|scale|sweep|trainer|logger|callbacks|hydra|output_dir|resume|inference|job)\b(?!\.optimizer)"
)
"""Keys that belong to the setting, or change nothing about the network; recipe.optimizer is a variant's own."""
METRICS = ("PQ", "PQ_things", "PQ_stuff", "mIoU", "AP", "AP50")
COSTS = ["parameters", "gmacs", "latency", "latency_low", "latency_high"]
LABELS = {"PQ_things": "things", "PQ_stuff": "stuff"}


def read_runs(paths: Iterable[str | Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read training runs, finished or not, from folders that hold some at any depth.

    Returns:
        The runs, one per row: "path", "setting" (what has to agree), "variant", "seed", "step", "max_steps", "metric"
        (the task's main one), "network" (arguments of `build_pem`, as JSON), "num_classes", and the last validation's
        `METRICS` in percent. And their validations, one per row: "path", "step", "value" of the main metric.

    Raises:
        UserError: a path does not exist, or there is no run at all.
    """
    rows, curves = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give runs of train.py, or folders that hold some")
        for config in sorted(path.rglob(".hydra/config.yaml"), key=_natural):
            folder = config.parents[1]
            try:
                run = _read_run(folder)
            except (UserError, OmegaConfBaseException, YAMLError, OSError, ValueError, KeyError, TypeError) as error:
                print(f"skipped {folder}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
                continue
            if run is not None:
                rows.append(run[0])
                curves += [{"path": str(folder), "step": step, "value": value} for step, value in run[1].items()]
    if not rows:
        raise UserError(f"there is no training run in {', '.join(map(str, paths))}: start one with train.py")
    runs = pd.DataFrame(rows).drop_duplicates("path", ignore_index=True)
    for _, group in runs.groupby("setting"):
        shared = set.intersection(*map(set, group["overrides"]))
        runs.loc[group.index, "variant"] = [variant_name(own, shared) for own in group["overrides"]]
    return runs, pd.DataFrame(curves, columns=["path", "step", "value"]).drop_duplicates(ignore_index=True)


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over seeds, for runs of one setting.

    Returns:
        Indexed by variant, the unchanged network first: every metric's mean and "<metric>_std" (NaN for one seed), the
        main metric's "difference" to the unchanged network, "seeds", "step", "max_steps", and `COSTS` if measured.
    """
    metric = runs["metric"].iloc[0]
    names = [name for name in METRICS if runs[name].notna().any()]
    groups = runs.groupby("variant", sort=False)
    table = groups[names].mean().join(groups[names].std().add_suffix("_std"))
    default = table[metric].get(DEFAULT) if metric in table else None
    if default is not None:
        table["difference"] = (table[metric] - default).where(table.index != DEFAULT)
    table["seeds"] = groups[metric].count()
    table = table.join(groups[["step", "max_steps"]].min())
    table = table.join(groups[[name for name in COSTS if name in runs]].first())
    return table.loc[sorted(table.index, key=lambda name: (name != DEFAULT, list(table.index).index(name)))]


def measure(runs: pd.DataFrame, size: tuple[int, int], rounds: int, device: torch.device) -> pd.DataFrame:
    """Count and time the runs' networks with random weights, in turn; without latency for 0 rounds.

    Returns:
        Indexed by "network": `COSTS`, parameters in millions, latency's median and quartiles in ms.
    """
    rows: dict[str, dict[str, float]] = {}
    timed: dict[str, torch.nn.Module] = {}
    for _, run in runs.drop_duplicates("network").iterrows():
        print(f"building {run['variant']}", file=sys.stderr)
        torch.manual_seed(0)
        try:
            network = _build(run, auxiliary="never").eval()
            gmacs = count_gmacs(_build(run, auxiliary="always"), *size)  # published counts have every layer's masks
        except Exception as error:  # whatever a backbone's library raises
            print(f"cannot measure {run['variant']}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        rows[run["network"]] = {"parameters": count_parameters(network) / 1e6, "gmacs": gmacs}
        if rounds:
            timed[run["network"]] = OptimizedNetwork(network).to(device)
    image = torch.randn(1, 3, *size, device=device)
    times: dict[str, list[float]] = {key: [] for key in timed}
    for number in range(rounds + 1):
        for key, network in timed.items():
            start = time.perf_counter()
            network(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[key].append(1000 * (time.perf_counter() - start))
    for key, values in times.items():
        low, median, high = pd.Series(values).quantile([0.25, 0.5, 0.75])
        rows[key] |= {"latency": median, "latency_low": low, "latency_high": high}
    return pd.DataFrame.from_dict(rows, orient="index", columns=COSTS if rounds else COSTS[:2])


def variant_name(overrides: Iterable[str], shared: Collection[str] = ()) -> str:
    """What a run changes, in a few words: "no masking + 3 layers"; `DEFAULT` for nothing.

    Overrides in `shared`, those of all runs that it is compared with, say nothing unless they are an ablation.
    """
    words = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if IGNORED.match(key) or (override in shared and key not in ("ablation", "decoder_layers")):
            continue
        parts = value.strip("[]").split(",") if key == "ablation" else [value]
        for part in filter(None, (part.strip() for part in parts)):
            rule = {
                "ablation": part.replace("_", " "),
                "decoder_layers": f"{part} layers",
                "num_queries": f"{part} queries",
                "backbone": part,
            }
            words.append(NAMES.get(f"{key}={part}", rule.get(key, f"{key}={part}")))
    return " + ".join(filter(None, words)) or DEFAULT


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[int, float]] | None:
    """A run's row and its validations; None if it is another job than training."""
    config: Any = OmegaConf.load(folder / ".hydra" / "config.yaml")
    if config.get("job") != "train":
        return None
    log = _read_log(folder / "csv")
    metric = str(config.task.monitor).removeprefix("val/")
    values = {name: log[f"val/{name}"].dropna() for name in METRICS if f"val/{name}" in log}
    overrides, written = folder / ".hydra" / "overrides.yaml", folder / "metrics.json"
    end = json.loads(written.read_text()) if written.is_file() else {}
    row = {
        "path": str(folder),
        "setting": _setting(config),
        "overrides": tuple(OmegaConf.load(overrides)) if overrides.is_file() else (),
        "seed": int(config.seed),
        "step": max(int(log.index.max()), int(end.get("step", 0))),
        "max_steps": int(config.trainer.max_steps),
        "metric": metric,
        "network": json.dumps(OmegaConf.to_container(config.network, resolve=True), sort_keys=True),
        # A table of instances has things only; 19 are Cityscapes' classes.
        "num_classes": len(end.get("per_class", [])) if config.task.name != "instance" and end else 19,
        **{name: float(values[name].iloc[-1]) if len(values.get(name, ())) else None for name in METRICS},
    }
    return row, values[metric].to_dict() if metric in values else {}


def _read_log(folder: Path) -> pd.DataFrame:
    """Everything logged by steps done; a resumed run has several files, of which the later ones win."""
    files = [*sorted(folder.glob("metrics_before_step_*.csv")), folder / "metrics.csv"]
    frames = [pd.read_csv(file, on_bad_lines="skip") for file in files if file.is_file()]
    if not frames:
        raise UserError("it has no log, csv/metrics.csv; its run.log may say why")
    log = pd.concat(frames, ignore_index=True)
    log = log[pd.to_numeric(log["step"], errors="coerce").notna()]
    # A step has a row of training and one of validation. Lightning counts steps from 0, readers count those done.
    return log.groupby(log["step"].astype(int) + 1).last()


def _setting(config: Any) -> str:
    """What has to agree before numbers may be compared, in one line."""
    steps, batch = config.trainer.max_steps, OmegaConf.select(config, "recipe.global_batch_size")
    crop = OmegaConf.select(config, "recipe.train_transform.crop_size")
    line = f"{config.dataset.name}, {config.task.name}, {steps} steps of {batch} crops"
    line += f" of {crop[0]}x{crop[1]}" if crop else ""
    rest = ("recipe.train_transform", "recipe.eval_transform", "task.inference", "inference")
    return f"{line}|{[OmegaConf.select(config, key) for key in rest]}"


def _build(run: pd.Series, auxiliary: str) -> torch.nn.Module:
    """Make a run's network, without starting foreign code from somebody's config."""
    arguments = {**json.loads(run["network"]), "auxiliary": auxiliary}
    backbone = arguments["backbone"]
    ours = arguments.pop("_target_", None) == "pem_lightning.build_pem"
    if isinstance(backbone, dict):
        ours = ours and str(backbone.get("_target_")).startswith("pem_lightning.models.backbones.")
        arguments["backbone"] = instantiate(backbone, _recursive_=False) if ours else None
    if not ours:
        raise UserError("only networks of build_pem are measured")
    return build_pem(**arguments, num_classes=int(run["num_classes"]))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts "2" before "10"."""
    return [(int(digits or 0), other) for digits, other in re.findall(r"(\d+)|(\D+)", str(path))]


def draw_quality(table: pd.DataFrame, metric: str) -> Figure:
    """The metric against latency, or against GMACs where latency was not measured."""
    cost = "latency" if "latency" in table else "gmacs"
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    table = table.dropna(subset=[metric, cost])
    for variant, row in table.iterrows():
        spread = [[row[cost] - row["latency_low"]], [row["latency_high"] - row[cost]]] if cost == "latency" else None
        color, marker = ("black", "*") if variant == DEFAULT else ("tab:blue", "o")
        error = row[f"{metric}_std"] if pd.notna(row[f"{metric}_std"]) else None
        axes.errorbar(row[cost], row[metric], xerr=spread, yerr=error, color=color, marker=marker, elinewidth=0.6)
        axes.annotate(str(variant), (row[cost], row[metric]), (5, 4), textcoords="offset points", fontsize=8)
    if table[cost].max() > 4 * table[cost].min():
        axes.set_xscale("log")
    axes.set(xlabel="latency of the network, ms" if cost == "latency" else "GMACs", ylabel=f"{metric}, percent")
    axes.grid(alpha=0.25)
    return figure


def draw_depth(table: pd.DataFrame, metric: str) -> Figure | None:
    """The metric, and the latency, against the number of decoder layers; None if only one depth was trained."""
    names = table.index.to_series().replace(DEFAULT, "6 layers")
    layers = names.str.extract(r"^(\d+) layers?$")[0].dropna().astype(int)
    if len(layers) < 2:
        return None
    points = table.assign(layers=layers).dropna(subset=["layers", metric]).sort_values("layers")
    figure = Figure(figsize=(5, 4.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.errorbar(points["layers"], points[metric], yerr=points[f"{metric}_std"].fillna(0), marker="o", capsize=3)
    upper.set_ylabel(f"{metric}, percent")
    cost = "latency" if "latency" in points else "gmacs"
    lower.plot(points["layers"], points[cost], marker="s", color="tab:orange")
    lower.set(ylabel="latency, ms" if cost == "latency" else "GMACs", xlabel="decoder layers", ylim=(0, None))
    return figure


def draw_curves(runs: pd.DataFrame, curves: pd.DataFrame, metric: str) -> Figure | None:
    """The metric over training, means over the seeds; None without two validations."""
    points = curves.merge(runs[["path", "variant"]], on="path")
    means = points.groupby(["variant", "step"], sort=False)["value"].mean().unstack("variant").sort_index()
    if len(means) < 2:
        return None
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20"]
    for place, variant in enumerate(means):
        color = "black" if variant == DEFAULT else colors(place % 20)
        axes.plot(means[variant].dropna(), marker="o", markersize=3, color=color, label=variant)
    axes.set(xlabel="steps", ylabel=f"{metric}, percent")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def readable(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A summary's numbers as text, with their units in the titles."""

    def text(name: str, form: str, missing: str = "–") -> pd.Series:
        return table[name].map(lambda value: missing if pd.isna(value) else form.format(value))

    columns: dict[str, pd.Series] = {}
    for name in METRICS:
        if name in table:
            columns[LABELS.get(name, name)] = text(name, "{:.1f}") + text(f"{name}_std", " ± {:.1f}", "")
        if name == metric and "difference" in table:
            columns["difference"] = text("difference", "{:+.1f}")
    columns["parameters, M"], columns["GMACs"] = text("parameters", "{:.2f}"), text("gmacs", "{:.1f}")
    if "latency" in table:
        quartiles = text("latency_low", " ({:.0f}–", "") + text("latency_high", "{:.0f})", "")
        columns["latency, ms (quartiles)"] = text("latency", "{:.0f}") + quartiles
    columns["seeds"] = text("seeds", "{}")
    steps, finished = text("max_steps", "{}"), table["step"] >= table["max_steps"]
    columns["steps"] = steps.where(finished, text("step", "{} of ") + steps)
    return pd.DataFrame(columns).rename_axis("variant")


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Ablations</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
div { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .3em .7em; text-align: right; white-space: nowrap }
td { border-top: 1px solid #8885 } tr > :first-child { text-align: left } thead th { cursor: pointer }
img { max-width: 100%; background: white }
</style>
BODY
<script>
for (const th of document.querySelectorAll("thead th")) th.onclick = () => {
  const column = th.cellIndex, body = th.closest("table").tBodies[0], sign = th.dataset.down ? 1 : -1;
  th.dataset.down = th.dataset.down ? "" : "1";
  const key = row => row.cells[column].textContent, number = text => parseFloat(text.replace("−", "-"));
  const compare = (a, b) => number(a) - number(b) || a.localeCompare(b);
  body.append(...[...body.rows].sort((a, b) => sign * compare(key(a), key(b))));
};
</script>
"""


def write_report(runs: pd.DataFrame, curves: pd.DataFrame, output: Path, head: str) -> None:
    """Write report.html, report.md, report.csv and the figures; `head` says how they were made.

    `runs` and `curves` are those of `read_runs`, with the costs of `measure`.
    """
    output.mkdir(parents=True, exist_ok=True)
    page, text, tables = [f"<h1>Ablations</h1><p>{html.escape(head)}</p>"], [f"# Ablations\n\n{head}\n"], []
    settings = list(runs.groupby("setting", sort=False))
    for number, (setting, own) in enumerate(settings, 1):
        prefix = "" if len(settings) == 1 else f"table{number}_"
        metric, title = own["metric"].iloc[0], str(setting).partition("|")[0]
        table = summarize(own)
        tables.append(table.assign(setting=title))
        shown = readable(table, metric).reset_index()
        page.append(f"<h2>{html.escape(title)}</h2><div>{shown.to_html(index=False, border=0)}</div>")
        lines = [list(shown), ["---", *["--:"] * (len(shown.columns) - 1)], *shown.to_numpy().tolist()]
        text.append(f"## {title}\n\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))
        figures = {"quality": draw_quality(table, metric), "depth": draw_depth(table, metric)}
        figures["curves"] = draw_curves(own, curves, metric)
        for name, figure in figures.items():
            if figure is None:
                continue
            figure.savefig(picture := io.BytesIO(), format="png")
            (output / f"{prefix}{name}.png").write_bytes(picture.getvalue())
            encoded = base64.b64encode(picture.getvalue()).decode()
            page.append(f'<p><img alt="{name}" src="data:image/png;base64,{encoded}">')
            text.append(f"![{name}]({prefix}{name}.png)\n")
    (output / "report.html").write_text(PAGE.replace("BODY", "\n".join(page)), encoding="utf-8")
    (output / "report.md").write_text("\n".join(text), encoding="utf-8")
    pd.concat(tables).to_csv(output / "report.csv", index_label="variant")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or that hold some")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder (default %(default)s)")
    parser.add_argument("--size", default="1024x2048", help="height x width of GMACs and latency (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--no-latency", action="store_true", help="count parameters and GMACs only")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+x\d+", options.size) or options.rounds < 1:
        parser.error("--size takes HEIGHTxWIDTH, such as 1024x2048, and --rounds a number from 1 on")
    height, width = map(int, options.size.split("x"))
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        runs, curves = read_runs(options.runs)
        rounds = 0 if options.no_latency else options.rounds
        runs = runs.join(measure(runs, (height, width), rounds, torch.device(options.device)), on="network")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = f"{len(runs)} runs, {runs['variant'].nunique()} variants; costs at {options.size}"
    head += f", latency on {options.device} over {rounds} rounds." if rounds else "."
    write_report(runs, curves, options.output, head)
    print(f"{head.partition(';')[0]}: report.html, .md, .csv and figures are in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
