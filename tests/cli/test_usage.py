"""What `--help` prints."""

import pytest

from pem_lightning.__main__ import JOBS
from tests.jobs import call


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_a_jobs_own_settings_on_a_screen(job, capsys):
    assert call(job, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python {job}.py KEY=VALUE ...\n  {JOBS[job]}\n\n")
    assert len(text.splitlines()) <= 60
    assert ("\n  resume: null\n" if job == "train" else "\n  checkpoint: ???  # ") in text
    assert "\n  task " in text
    assert "_target_" not in text
    assert "\n\n\n" not in text
    assert call(job, "-h") == 0
    assert capsys.readouterr().out == text


def test_help_shows_what_a_job_can_be_told(capsys):
    call("predict", "--help")
    text = capsys.readouterr().out
    assert "  save: null  # all, masks or overlays" in text
    assert "  launcher  local, ray\n" in text
    assert "  tile: null  # height and width" in text
    assert "  python predict.py checkpoint=camvid input=street.jpg " in text
    assert "recipe" not in text.partition("choices")[2]
    call("train", "--help")
    text = capsys.readouterr().out
    assert "  max_steps: 90000\n" in text
    assert "efficientnet_lite0, " in text
    assert "  sweep      optuna, paper_ablations, " in text
