"""Growth of memory is seen, in a program of a second; the long run itself is for people."""

import sys
from pathlib import Path

from scripts.benchmark import soak
from scripts.benchmark.__main__ import main

GROWS = "import time; kept = []; [(kept.append(bytearray(2**22)), time.sleep(0.05)) for _ in range(40)]"


def run(monkeypatch, program):
    monkeypatch.setattr(
        soak, "commands", lambda folder, options: [("a part", [sys.executable, "-c", program], Path.cwd())]
    )
    return main(["soak", "--every", "0.05", "--device", "cpu"])


def test_what_stays_flat_is_a_table(monkeypatch, capsys):
    assert run(monkeypatch, "import time; time.sleep(2)") == 0
    assert "| a part |" in capsys.readouterr().out


def test_growth_and_failures_are_errors(monkeypatch, capsys):
    assert run(monkeypatch, GROWS) == 2
    assert "error: not flat after the first tenth: memory, MiB of a part" in capsys.readouterr().err
    assert run(monkeypatch, "raise SystemExit('no such thing')") == 2
    assert "has failed: no such thing" in capsys.readouterr().err
