"""How tests run train.py, evaluate.py and predict.py: in their own process, which spares the imports."""

import sys

from pem_lightning import run


def call(job: str, *arguments: str) -> int:
    """Run a job as its entry point does; returns the exit code."""
    before = sys.argv
    sys.argv = [f"{job}.py", *arguments]
    try:
        run.main(job)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0
