"""Tables and picture of a made-up result; scripts/benchmark.py's test makes those of a real one."""

import io

import pytest
from PIL import Image

from pem_lightning.benchmark.plot import draw_latencies
from pem_lightning.benchmark.report import to_markdown


def spread(median):
    return {"min": median * 0.9, "low": median * 0.95, "median": median, "high": median * 1.1, "max": median * 1.5}


def row(name, median, **fields):
    return {
        "name": name,
        "kind": "fast",
        "weights": "random",
        "tasks": ["semantic", "panoptic"],
        "note": "",
        "latency_ms": spread(median),
        "images_per_s": 1000 / median,
        "speedup": None,
        "semantic_only_ms": spread(0.8 * median),
        "stages_ms": {"network": spread(0.7 * median), "post-processing": spread(0.3 * median)},
        "tasks_ms": {"semantic": spread(0.1 * median), "panoptic": spread(0.2 * median)},
        "network_ms": spread(0.7 * median),
        "gmacs": 12.34,
        "parameters_m": 5.678,
        "kept_queries": 30,
        "roofline": {"gbytes": 1.5, "least_ms": 20.0, "bound_by": "memory", "reached": 0.25},
        **fields,
    }


@pytest.fixture
def result():
    return {
        "environment": {"command": "python x", "device": "a GPU", "threads": 2, "cores": 4, "torch": "2.0"},
        "settings": {"size": (512, 1024), "batch": 1, "rounds": 3, "warmup": 1},
        "ceilings": {"bandwidth": 2e10, "matmul": {"float32": 1e11}, "conv": {"float32": 2e11}},
        "contestants": [
            row("one", 100.0, memory={"base": 400.0, "peak": 900.0, "increase": 500.0}),
            row("two", 5000.0, memory={"failed": "killed"}, kept_queries=None, note="it cheats", speedup=spread(0.02)),
        ],
        "skipped": {"three": "it does not work"},
    }


def test_tables_say_what_was_measured(result):
    text = to_markdown(result)
    assert "| one | 100.0 | 95.0 to 110.0 | 90.0 to 150.0 |  | 10.00 | 80.0 | 12.3 | 5.68 | 30 |" in text
    assert "| two | 5000 | 4750 to 5500 | 4500 to 7500 | 0.02 (0.02 to 0.03) | 0.20 | 4000 | 12.3 | 5.68 |  |" in text
    assert "- two: it cheats." in text
    assert "| one | 70.0 | 30.0 | 10.0 | 20.0 |" in text
    assert "| one | 24.7 | 1.50 | 20.0 | memory | 70.0 | 25% |" in text
    assert "copying 20.0 GB/s; float32 100 GFLOP/s in a matrix product, 200 in a convolution" in text
    assert "| one | 500 | 400 | 900 |" in text
    assert "| two | killed |  |  |" in text
    assert "- three: it does not work" in text
    assert "## Equality" not in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_picture_grows_with_the_contestants(result):
    sizes = []
    for rows in (result["contestants"], result["contestants"] * 4):
        with Image.open(io.BytesIO(draw_latencies({**result, "contestants": rows}))) as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > sizes[0][1] + 200
