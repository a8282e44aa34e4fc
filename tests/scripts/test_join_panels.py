"""scripts/join_panels.py: what it writes, and its exit codes."""

import numpy as np
import pytest
from PIL import Image

from scripts.join_panels import GAP, main


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_panels_are_below_one_another(tmp_path, ending, capsys):
    for name, value in (("a", 200), ("b", 50)):
        Image.fromarray(np.full((20, 60, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    target = tmp_path / f"sheet.{ending}"
    assert main([str(target), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--width=120"]) == 0
    sheet = np.array(Image.open(target).convert("RGB")).astype(int)
    assert sheet.shape == (40 + GAP + 40, 120, 3)
    assert abs(sheet[20, 60] - 200).max() <= 2
    assert abs(sheet[40 + GAP + 20, 60] - 50).max() <= 2
    assert f"wrote {target}: 120x88, " in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert main([str(tmp_path / "b.jpg"), str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
    for arguments in (["b.sheet"], ["b.jpg", "--width=0"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / arguments[0]), str(tmp_path / "a.png"), *arguments[1:]])
    assert not list(tmp_path.glob("b.*"))
