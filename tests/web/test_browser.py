"""The page in Chromium, as a user opens it: the results of Python's `Runtime`, and no request to another server."""

import shutil
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.street_scene import draw_street
from pem_lightning.deploy import Runtime
from tests.deploy.conftest import tiny_exports  # noqa: F401, a fixture
from web import build, serve

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not build.ORT.is_dir(), reason="needs onnxruntime-web: npm ci in web/"),
]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader")
TIMEOUT = 60_000  # milliseconds; a busy computer is slow to compile WebAssembly


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as launcher:
        installed = next(filter(None, map(shutil.which, CHROMIUM)), launcher.chromium.executable_path)
        if not Path(installed).is_file():
            pytest.skip("needs Chromium: playwright install chromium")
        with launcher.chromium.launch(executable_path=installed, args=SOFTWARE_GPU) as started:
            yield started


@pytest.fixture(scope="module")
def site(tiny_exports, tmp_path_factory):  # noqa: F811
    """The page's folder with a tiny network, and its address."""
    folder = tmp_path_factory.mktemp("site")
    build.copy_page(folder)
    shutil.copyfile(tiny_exports.onnx, folder / "model.onnx")
    with serve.make_server(folder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def open_page(browser, site):
    """A function that opens the page at some width and waits for the network; `page.requested` are all addresses."""
    contexts = []

    def opened(width=1280, query=""):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.requested, page.failures = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.failures.append(error))
        page.goto(site[1] + query)
        playwright.expect(page.locator("#network")).to_contain_text("model.onnx: 19 classes", timeout=TIMEOUT)
        return page

    yield opened
    for context in contexts:
        assert not any(page.failures for page in context.pages)
        context.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A drawn street of 200 x 120 pixels."""
    path = tmp_path_factory.mktemp("photo") / "street.png"
    Image.fromarray(draw_street(np.random.default_rng(0), 120, 200)[0]).save(path)
    return path


def segment(page, photo):
    page.set_input_files("#photo", photo)
    page.wait_for_selector("#panel:not([hidden]), #error:not([hidden])")
    assert not page.is_visible("#error"), page.inner_text("#error")


def overlay_is_drawn(page):
    return page.evaluate(
        """() => {
            const canvas = document.getElementById("overlay");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.some((value, i) => i % 4 === 3 && value > 0);
        }"""
    )


@pytest.mark.parametrize("backend", ["wasm", "webgpu"])
def test_results_are_pythons(backend, open_page, site, photo, tmp_path):
    page = open_page(query=f"?backend={backend}")
    if backend == "webgpu" and page.is_hidden("#choice"):
        pytest.skip("this Chromium has no software GPU")
    assert page.input_value("#backend") == backend
    page.set_default_timeout(4 * TIMEOUT)  # a GPU made of software
    segment(page, photo)
    assert overlay_is_drawn(page)
    assert ("Threads" in page.inner_text("#facts")) == (backend == "wasm")
    for label in ("Overlay PNG", "Panoptic PNG", "Segments JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=label).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
    result = Runtime(site[0] / "model.onnx")(photo)
    result.save(tmp_path / "python")
    assert len(result.segments) > 1
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        file.name for file in (tmp_path / "python").iterdir()
    }
    maps = [np.asarray(Image.open(folder / "street_panoptic.png")) for folder in (tmp_path, tmp_path / "python")]
    assert maps[0].shape == maps[1].shape
    assert (maps[0] != maps[1]).any(-1).mean() < 1e-3  # logits differ in their last bits
    assert page.locator("#legend button").count() == len({segment.class_id for segment in result.segments})


def test_nothing_leaves_the_device(open_page, site, photo):
    page = open_page()
    segment(page, photo)
    names = {address.removeprefix(site[1]) for address in page.requested}
    assert {"worker.js", "model.onnx", "ort/ort-wasm-simd-threaded.wasm"} <= names  # those of the worker are seen
    assert all(address.startswith((site[1], "blob:", "data:")) for address in page.requested)
    refused = page.evaluate(
        """() => new Promise((resolve) => {
            addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
            fetch("https://example.org/").catch(() => setTimeout(resolve, 1000, null));
        })"""
    )
    assert refused.startswith("https://example.org")


@pytest.mark.parametrize(("place", "name"), [("#file", "bad.onnx"), ("#photo", "bad.png")])
def test_a_bad_file_is_one_line_and_nothing_is_lost(place, name, open_page, photo, tmp_path):
    (tmp_path / name).write_bytes(b"neither network nor photo")
    page = open_page()
    page.set_input_files(place, tmp_path / name)
    page.wait_for_selector("#error:not([hidden])")
    assert (
        page.inner_text("#error")
        == {
            "bad.onnx": "bad.onnx cannot be opened: it is damaged, or no .onnx file",
            "bad.png": "bad.png is no picture that this browser reads: choose a JPEG, PNG or WebP file",
        }[name]
    )
    segment(page, photo)
    assert overlay_is_drawn(page)


def test_a_phone_scrolls_in_one_direction(open_page, photo):
    page = open_page(width=390)
    widths = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert page.evaluate(widths) == [390, 390]
    segment(page, photo)
    assert page.evaluate(widths) == [390, 390]
    assert page.locator("#picture").bounding_box()["width"] > 350
