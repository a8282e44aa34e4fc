"""Tables and picture of a made-up result; scripts/benchmark.py's test makes those of a real one."""

import io

import pytest
from PIL import Image

from pem_lightning.benchmark.plot import draw_steps
from pem_lightning.benchmark.training.report import to_markdown
from pem_lightning.benchmark.training.steps import STAGES


def spread(median):
    return {"min": median * 0.9, "low": median * 0.95, "median": median, "high": median * 1.1, "max": median * 1.5}


def row(kind, factor, **more):
    return {
        "name": f"resnet50 {kind} float32",
        "kind": kind,
        "optimizer": "AdamW fused, groups: 4",
        "step_ms": spread(2000 * factor),
        "ratio": spread(factor),
        "images_per_s": 1 / factor,
        "stages_ms": {stage: spread(400 * factor) for stage in STAGES},
        "stage_ratios": {stage: spread(factor) for stage in STAGES},
        "host_synchronisations": None,
        **more,
    }


@pytest.fixture
def result():
    memory = {"base": 400.0, "peak": 3000.4, "increase": 2600.4}
    equality = {
        "name": "resnet50 ours float32",
        "loss": 103.0671,
        "loss_difference": 1e-6,
        "largest_difference": 5.7e-6,
        "gradient_norm": 7093.4714,
        "gradient_norm_difference": 1e-4,
        "gradient_difference": 1.6e-3,
    }
    return {
        "environment": {"command": "python x", "device": "a CPU", "torch": "2.13", "threads": 2, "cores": 2},
        "settings": {"size": (256, 512), "batch": 2, "rounds": 5, "warmup": 1, "segments": 15, "num_points": 12544},
        "steps": [row("straightforward", 1.0, memory=memory), row("ours", 0.5, memory={"failed": "killed"})],
        "equality": [equality],
        "skipped": {"resnet50 ours float16": "no GPU"},
    }


def test_tables(result):
    lines = to_markdown(result).splitlines()
    assert lines[0] == "# Benchmark of training"
    assert "256 x 512 pixels, batch 2, on a CPU" in lines[2]
    assert "15 segments per image, 12544 points" in lines[2]
    start = "| resnet50 ours float32 | "
    assert start + "103.0671 | 1.0e-06 | 5.7e-06 | 7093.47 | 1.0e-04 | 1.6e-03 |" in lines
    assert (
        start + ("1000 | 950.0 to 1100 | 900.0 to 1500 | 0.50 (0.47 to 0.55) | 2.00 | AdamW fused, groups: 4 |")
        in lines
    )
    assert start + "200.0 (0.50) | " * 4 + "200.0 (0.50) |" in lines
    assert "| resnet50 straightforward float32 | " + "400.0 | " * 4 + "400.0 |" in lines
    assert "| resnet50 straightforward float32 | 2600 | 400 | 3000 |" in lines
    assert start + "killed |  |  |" in lines
    assert lines[-1] == "- resnet50 ours float16: no GPU"
    assert lines.index("## Equality") < lines.index("## Step")
    assert "host synchronisations" not in "".join(lines)


def test_what_was_not_measured_has_no_section_or_column(result):
    result |= {"equality": [], "skipped": {}, "steps": [row("ours", 0.5, ratio=None, stage_ratios={})]}
    table = to_markdown(result)
    assert [line for line in table.splitlines() if line.startswith("## ")] == ["## Step", "## Stages, ms (ratio)"]
    assert "| resnet50 ours float32 | 1000 | 950.0 to 1100 | 900.0 to 1500 |  | 2.00 |" in table


def test_synchronisations_are_shown_where_there_is_a_gpu(result):
    result["steps"][1]["host_synchronisations"] = 1
    table = to_markdown(result)
    assert "optimiser | host synchronisations |" in table
    assert "groups: 4 | 1 |" in table


def test_picture(result):
    with Image.open(io.BytesIO(draw_steps(result))) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width > 800
    assert {(0x1F, 0x3A, 0x5F), (0x1B, 0x7F, 0x79), (0xED, 0xAE, 0x49), (0xD1, 0x49, 0x5B)} <= colors
