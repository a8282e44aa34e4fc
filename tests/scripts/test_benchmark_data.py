import importlib.util
import json
from pathlib import Path

import cv2
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_data.py"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("benchmark_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    yield module.main
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def test_prints_a_table_and_writes_the_numbers(main, tmp_path, capsys):
    assert main(["--quick", "--workers", "0", "1", "--json", str(tmp_path / "numbers.json")]) == 0
    printed = capsys.readouterr().out
    assert "| decode image (PNG) |" in printed
    assert "| workers | PNG, images/s | cache, images/s | factor |" in printed
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert all(0 < stage["low"] <= stage["median"] <= stage["high"] for stage in numbers["stages_ms"].values())
    assert set(numbers["loader_images_per_s"]["cache"]) == {"0", "1"}
    stages = numbers["stages_ms"]
    expected = stages["resize all, then crop"]["median"] / stages["crop first"]["median"]
    assert numbers["factors"]["crop first instead of resizing all"] == expected


def test_mistakes_end_in_one_line(main, capsys):
    assert main(["--images", "1"]) == 2
    assert capsys.readouterr().err == "error: give at least 4 images, 2 rounds and 0 workers\n"
