"""The page as users start it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image

from pem_lightning.inference.predictor import Predictor
from tests.jobs import ROOT, call

CHROMIUM = shutil.which("chromium")
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET = (*QUIET, "disable-component-update", "disable-sync")


def start(folder, *arguments):
    """A server on a free port; returns its process and address."""
    (folder / "tmp").mkdir()
    places = {"TMPDIR": str(folder / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "log")}  # made by importing torch
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "app.py"), "port=0", "hydra.run.dir=log", *arguments]
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(300, child.kill)
    watchdog.daemon = True  # else pytest would wait for it
    watchdog.start()
    lines = []
    for line in child.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return child, found[0]
    pytest.fail("".join(lines))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_a_bad_file_and_then_a_good_one(tmp_path, photo):
    pytest.importorskip("gradio")
    client_of = pytest.importorskip("gradio_client")
    child, url = start(tmp_path, "max_megabytes=1")
    try:
        with urllib.request.urlopen(url) as answer:
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        client = client_of.Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
        (tmp_path / "bad.jpg").write_text("no photograph")
        with pytest.raises(Exception, match=r"^cannot read bad\.jpg .*: check that it is a complete image file$"):
            client.predict(client_of.handle_file(tmp_path / "bad.jpg"), api_name="/segment")
        answer = client.predict(client_of.handle_file(photo), task="semantic", opacity=0.25, api_name="/segment")
        assert np.array_equal(Image.open(answer[0]["value"]), Predictor("camvid")(photo).overlay(0.25))
        with pytest.raises(Exception, match=r"street\.png|choices"):
            client.predict(client_of.handle_file(photo), task="instance", api_name="/segment")
    finally:
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert "bad.jpg" not in out
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "log", "bad.jpg", "downloads"}


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path, photo):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    (tmp_path / "bad.jpg").write_text("no photograph")
    child, url = start(tmp_path)
    elsewhere = []
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=[f"--{name}" for name in QUIET])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.set_default_timeout(60_000)
            page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
            page.goto(url)
            choose = page.locator("input[type=file]").first
            choose.set_input_files(tmp_path / "bad.jpg")
            page.get_by_text("cannot read bad.jpg").wait_for()
            page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
            page.locator("input[type=file]").first.set_input_files(photo)
            page.locator("table.legend").wait_for()
            page.get_by_alt_text("Overlay").click(position={"x": 20, "y": 20})
            page.get_by_text(re.compile(r"pixels, box \d")).wait_for()
            page.get_by_label("panoptic").check()
            page.get_by_text("Click on the picture").wait_for()  # of a new result
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            browser.close()
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert elsewhere == []


def test_without_gradio_one_line_names_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pem_lightning.cli.jobs.find_spec", lambda name: None)
    assert call("app", "hydra.run.dir=log") == 2
    assert capsys.readouterr().err.endswith(
        "error: the page needs the package gradio: pip install -r requirements-app.txt\n"
    )
