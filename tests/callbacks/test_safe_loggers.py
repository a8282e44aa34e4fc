import logging

from lightning.pytorch.loggers import CSVLogger

from pem_lightning.callbacks.loggers import Guarded, SafeCSVLogger


class Lost(CSVLogger):
    """A tracker whose connection is lost."""

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route\nto host")

    def finalize(self, status):
        raise ConnectionError("again")


class SafeLost(Guarded, Lost):
    pass


def test_a_lost_connection_is_said_once_and_ends_nothing(tmp_path, caplog):
    logger = SafeLost(tmp_path)
    with caplog.at_level(logging.WARNING):
        logger.log_metrics({"a": 1.0}, step=1)
        logger.log_metrics({"a": 2.0}, step=2)
        logger.finalize("success")
        with logger.guard():
            raise TimeoutError("of the tracker's own")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "SafeLost LOSES NUMBERS (ConnectionError: no route to host): training goes on"
    )


def test_a_full_disk_costs_numbers_only_until_there_is_room(tmp_path, caplog):
    logger = SafeCSVLogger(tmp_path, name="csv", version="")
    logger.log_metrics({"a": 1.0}, step=0)
    folder = tmp_path / "csv"
    (folder / "metrics.csv").mkdir()  # a file cannot be opened there
    with caplog.at_level(logging.WARNING):
        logger.save()
    assert "LOSES NUMBERS (IsADirectoryError" in caplog.text
    (folder / "metrics.csv").rmdir()
    logger.log_metrics({"a": 2.0}, step=1)
    logger.save()
    assert (folder / "metrics.csv").read_text().split() == ["a,step", "1.0,0", "2.0,1"]


def test_callbacks_know_them_as_lightnings():
    assert issubclass(SafeCSVLogger, CSVLogger)
