"""After a sweep: what became of its jobs, told from their folders, wherever they ran."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.errors import HydraException

from pem_lightning.config import CONF, explain
from pem_lightning.files import write_file
from pem_lightning.sweeps.job import RECORD, describe, read_record
from pem_lightning.sweeps.plan import Sweep


def run_sweep(job: str, sweep: Sweep, run: Callable[[], object]) -> int:
    """Run all jobs and print one summary.

    Args:
        job: name of the entry point's config.
        sweep: as planned.
        run: Hydra's main.

    Returns:
        The exit code: 0 if all jobs finished, 1 if one failed, 2 if none could start, 130 if the user stopped them.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves it to us how an error is shown
    packages = [str(CONF.parent), os.environ.get("PYTHONPATH", "")]  # where other machines' processes find ours
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
    sweep.directory.mkdir(parents=True, exist_ok=True)
    go_on = f"add hydra.sweep.dir='{sweep.directory}' to go on"
    code = 0
    try:
        run()
    except KeyboardInterrupt:
        code = 130
        print(f"error: interrupted; {go_on}", file=sys.stderr)
    except HydraException as error:
        code = 2
        print(f"error: {explain(error, job)}", file=sys.stderr)
    except Exception as error:
        code = 1
        log_file = write_file(sweep.directory / "error.log", traceback.format_exc())
        print(f"error: the sweep stopped early ({describe(error)}), see {log_file}; {go_on}", file=sys.stderr)
    logging.shutdown()
    text, failed = summarize(sweep.directory)
    print(text, flush=True)
    return code or int(failed > 0)


def summarize(directory: Path) -> tuple[str, int]:
    """Tell what became of the jobs in a sweep's folder.

    Returns:
        One line per job, in their order, and the number of those that did not finish.
    """
    folders = sorted((path.parent for path in directory.glob(f"*/{RECORD}")), key=_number)
    records = [read_record(folder) for folder in folders]
    failed = sum(record.get("status") != "finished" for record in records)
    lines = [f"{len(records) - failed} of {len(records)} jobs finished in {directory}"]
    width = max((len(folder.name) for folder in folders), default=0)
    for folder, record in zip(folders, records, strict=True):
        lines.append(f"  {folder.name:{width}}  {_outcome(record)}")
    return "\n".join(lines), failed


def _number(folder: Path) -> tuple[int, str]:
    match = re.match(r"\d+", folder.name)
    return (int(match[0]) if match else sys.maxsize, folder.name)


def _outcome(record: dict) -> str:
    status = record.get("status")
    if status == "finished":
        value = record["value"]
        return f"{record['metric']} {float('nan') if value is None else value:.2f}"
    if status == "failed":
        return f"failed: {record['error']}"
    return "interrupted" if status == "interrupted" else "did not end (killed, or still running)"
