"""The tool `pem convert-checkpoint` of a checkout: `python scripts/convert_checkpoint.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.__main__ import run_tool
from pem_lightning.tools.convert_checkpoint import main

if __name__ == "__main__":
    run_tool(main)
