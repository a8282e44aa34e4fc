"""The tool `pem evaluate-panoptic` of a checkout: `python scripts/evaluate_panoptic.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.__main__ import run_tool
from pem_lightning.tools.evaluate_panoptic import main

if __name__ == "__main__":
    run_tool(main)
