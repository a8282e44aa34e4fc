from unittest.mock import MagicMock

import pytest
import wandb

from pem_lightning.callbacks.loggers import OfflineWandbLogger


@pytest.fixture
def runs(monkeypatch):
    """Arguments of the runs that are started; the server does not take any."""
    started = []

    def init(**arguments):
        started.append(arguments)
        if arguments.get("mode") != "offline":
            raise wandb.errors.CommError("no such\nhost")
        return MagicMock(id="toy")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return started


@pytest.mark.parametrize(
    ("logged_in", "mode", "modes", "reason"),
    [
        (False, None, ["offline"], "nobody is logged in"),
        (True, None, [None, "offline"], "no such host"),
        (False, "offline", ["offline"], None),
    ],
)
def test_a_run_is_offline_without_a_login_or_a_server(
    runs, logged_in, mode, modes, reason, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(wandb, "login", lambda **_: logged_in)
    settings = {} if mode is None else {"mode": mode}
    logger = OfflineWandbLogger(tmp_path, project="toy", tags=["a"], **settings)
    assert not runs  # starts when it is used
    assert logger.experiment is logger.experiment
    assert [run.get("mode") for run in runs] == modes
    assert runs[-1]["tags"] == ["a"]
    assert [m for m in caplog.messages if "OFFLINE" in m] == (
        [] if reason is None else [f"wandb: the run is OFFLINE ({reason}): `wandb sync` uploads it later"]
    )


def test_a_resumed_run_keeps_its_id(tmp_path):
    for folder, name in (("run-20260101_000000-old", "old"), ("offline-run-20260202_000000-new", "new")):
        (tmp_path / "wandb" / folder).mkdir(parents=True)
        (tmp_path / "wandb" / folder / f"run-{name}.wandb").touch()
    assert OfflineWandbLogger(tmp_path, resumed_from="last.ckpt").version == "new"
    assert OfflineWandbLogger(tmp_path, resumed_from="last.ckpt", id="own").version == "own"
    assert OfflineWandbLogger(tmp_path).version is None  # a new run in an old folder
    assert OfflineWandbLogger(tmp_path / "empty", resumed_from="last.ckpt").version is None
