"""The tool `pem check-data` of a checkout: `python scripts/check_data.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.__main__ import run_tool
from pem_lightning.tools.check_data import main

if __name__ == "__main__":
    run_tool(main)
