"""The tool `pem prepare-ade20k` of a checkout: `python scripts/prepare_ade20k.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.__main__ import run_tool
from pem_lightning.tools.prepare_ade20k import main

if __name__ == "__main__":
    run_tool(main)
