"""The page, by Gradio, an optional package: what is on it, and the server."""

from __future__ import annotations

import functools
import html
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from pem_lightning.app.handlers import (
    LegendRow,
    Segmented,
    SegmentedVideo,
    Segmenter,
    Settings,
    found_at,
    is_video,
    legend,
    write_downloads,
    write_overlay,
)
from pem_lightning.images import Photo
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.types import UserError

FORGET_AFTER = 600
"""Seconds after which the server deletes uploads and results."""
WAITING = 16
"""So many requests may wait for the network; further ones are refused."""
SESSIONS = 16
"""So many visitors' results are kept in memory."""
PRECISIONS = ("float32", "bfloat16", "float16")

# No request may leave this server, whatever a library's page asks for.
_SOURCES = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "worker-src": "'self' blob:",
    "frame-ancestors": "'self'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in _SOURCES.items()),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_CSS = """
.gradio-container { width: 100% !important; max-width: 1400px !important; margin: 0 auto }
.legend { width: 100%; border: 0 !important; border-collapse: collapse }
.legend tr, .legend th, .legend td { border: 0 !important; padding: 4px 8px; text-align: right }
.legend tr { border-bottom: 1px solid var(--border-color-primary) !important }
.legend th:first-child, .legend td:first-child { text-align: left; width: 100% }
.legend th { font-weight: 600; color: var(--body-text-color) }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.6em; border-radius: 3px;
  vertical-align: -0.1em; border: 1px solid var(--border-color-primary) }
.note { min-height: 1.5em }
"""
_HINT = "Click on the picture to learn what is there."

log = logging.getLogger(__name__)


class _Shown(NamedTuple):
    """What a visitor sees, None for a video, and the folder of its files."""

    result: SegmentedImage | None
    folder: Path


def _forget(shown: _Shown | None) -> None:
    if shown is not None:
        shutil.rmtree(shown.folder, ignore_errors=True)


def legend_html(rows: Iterable[LegendRow]) -> str:
    """A table with a row for each class."""
    rows = list(rows)
    counted = any(row.objects is not None for row in rows)
    lines = []
    for row in rows:
        count = f"<td>{'' if row.objects is None else row.objects}</td>" if counted else ""
        swatch = f'<span class="swatch" style="background: rgb{row.color}"></span>'
        lines.append(f"<tr><td>{swatch}{html.escape(row.name)}</td><td>{100 * row.share:.1f}&nbsp;%</td>{count}</tr>")
    if not lines:
        return '<p class="note">Nothing was found. Lower the thresholds, or choose other classes or another task.</p>'
    head = f"<tr><th>Class</th><th>Pixels</th>{'<th>Objects</th>' if counted else ''}</tr>"
    return f'<table class="legend">{head}{"".join(lines)}</table>'


def found_html(found: Any) -> str:
    """One line about what was clicked on."""
    if found is None:
        return '<p class="note">Nothing is drawn there.</p>'
    left, top, right, bottom = found.box
    score = "" if found.score is None else f", score {found.score:.2f}"
    return (
        f'<p class="note"><b>{html.escape(found.name)}</b>{score}, {found.area:,} pixels, '
        f"box {left}, {top} to {right}, {bottom}</p>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _one_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake is one line on the page; a bug is one as well, and a traceback in the log."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), title="", print_exception=False) from None
        except gr.Error:
            raise
        except Exception:
            log.exception("%s failed", function.__name__)
            raise gr.Error("this did not work: the server's log says why", title="", print_exception=False) from None

    return wrapped


class _Handlers:
    """What the page's controls do; files of results are written under `folder`."""

    def __init__(self, segmenter: Segmenter, folder: Path) -> None:
        self.segmenter, self.folder = segmenter, folder

    @_one_line
    def segment(
        self,
        file: str | None,
        before: _Shown | None,
        opacity: float,
        task: str,
        object_mask_threshold: float,
        overlap_threshold: float,
        score_threshold: float,
        classes: list[str],
        precision: str,
        progress: Any = gr.Progress(),  # noqa: B008  # Gradio recognises it by this default
    ) -> list[Any]:
        """A file that was handed in; without one, the photograph that is shown, with other settings."""
        settings = Settings(
            task, object_mask_threshold, overlap_threshold, score_threshold, tuple(classes or ()), precision
        )
        if file is None:
            if before is None or before.result is None:
                raise UserError("drop a photograph or a video first")
            old = before.result
            return self._show(self.segmenter.again(Photo(old.name, old.image, old.file), settings), opacity, before)
        if not is_video(file):
            return self._show(self.segmenter.photo(file, settings), opacity, before)
        target = Path(tempfile.mkdtemp(dir=self.folder)) / f"{Path(file).stem}.mp4"
        try:
            video = self.segmenter.video(file, settings, target, opacity, lambda p: progress(p, desc="segmenting"))
        except BaseException:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise
        return self._show_video(target, video, before)

    @_one_line
    def change(self, before: _Shown | None, *settings: Any) -> Any:
        """Other settings for the photograph that is shown, if there is one."""
        return gr.skip() if before is None or before.result is None else self.segment(None, before, *settings)

    @_one_line
    def repaint(self, shown: _Shown | None, opacity: float) -> Any:
        """The same result with another opacity."""
        if shown is None or shown.result is None:
            return gr.skip()
        overlay = str(write_overlay(shown.result, shown.folder, opacity))
        return [overlay, overlay]

    @_one_line
    def click(self, shown: _Shown | None, event: gr.SelectData) -> str:
        """What is where the photograph was clicked on."""
        if shown is None or shown.result is None:
            raise UserError(f"results are forgotten after {FORGET_AFTER // 60} minutes: drop the photograph again")
        return found_html(found_at(shown.result, *map(int, event.index)))

    def _show(self, segmented: Segmented, opacity: float, before: _Shown | None) -> list[Any]:
        """All outputs for a photograph."""
        result = segmented.result
        shown = _Shown(result, Path(tempfile.mkdtemp(dir=self.folder)))
        start = time.perf_counter()
        overlay = write_overlay(result, shown.folder, opacity)
        drawing = time.perf_counter() - start
        ids, coco = write_downloads(result, shown.folder)
        _forget(before)
        height, width = result.image.shape[:2]
        stages = [("reading", segmented.reading), ("network", segmented.network), ("drawing", drawing)]
        times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in stages if seconds)
        return [
            shown,
            gr.Image(str(overlay), visible=True),
            gr.Video(None, visible=False),
            _note(_HINT),
            legend_html(legend(result)),
            *(gr.DownloadButton(value=str(path), interactive=True) for path in (overlay, ids, coco)),
            _note(f"{width} x {height} pixels: {times}"),
        ]

    def _show_video(self, path: Path, video: SegmentedVideo, before: _Shown | None) -> list[Any]:
        """All outputs for a video."""
        _forget(before)
        speed = f"{video.frames} frames in {video.seconds:.1f} s, {video.frames / video.seconds:.1f} frames per second"
        buttons = [gr.DownloadButton(value=None, interactive=False)] * 3
        shown = _Shown(None, path.parent)
        return [shown, gr.Image(None, visible=False), gr.Video(str(path), visible=True), "", "", *buttons, _note(speed)]


def build_page(segmenter: Segmenter, folder: Path) -> Any:
    """The page as `gradio.Blocks`; files of results are written under `folder`."""
    limits, info = segmenter.limits, segmenter.base.info
    with gr.Blocks(title="PEM segmentation", analytics_enabled=False, delete_cache=(60, FORGET_AFTER)) as page:
        shown = gr.State(None, time_to_live=FORGET_AFTER, delete_callback=_forget)
        gr.Markdown(
            f"# PEM segmentation\n{info.num_classes} classes of {info.name}. Photographs, and videos of up to "
            f"{limits.seconds:g} seconds; files of up to {limits.megabytes:g} MB. They are deleted after "
            f"{FORGET_AFTER // 60} minutes."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tabs():
                    with gr.Tab("File"):
                        file = gr.File(label="Photograph or video", height=160)
                    with gr.Tab("Camera"):
                        camera = gr.Image(label="Camera", sources=["webcam"], type="filepath", format="png", height=280)
                opacity, settings = _build_settings(segmenter)
                run = gr.Button("Segment again")
            with gr.Column(scale=2, min_width=320):
                results = _build_results()
        _connect(_Handlers(segmenter, folder), file, camera, run, opacity, settings, [shown, *results])
    return page.queue(max_size=WAITING, default_concurrency_limit=4)


def _build_settings(segmenter: Segmenter) -> tuple[Any, list[Any]]:
    """The opacity, and what `_Handlers.segment` takes after it, in its order."""
    default = segmenter.default
    task = gr.Radio(list(segmenter.tasks), value=default.task, label="Task")
    opacity = gr.Slider(0, 1, value=0.55, step=0.05, label="Opacity")
    with gr.Accordion("Thresholds, classes, precision", open=False):
        objects = gr.Slider(0, 1, value=default.object_mask_threshold, step=0.05, label="Panoptic: lowest class score")
        overlap = gr.Slider(0, 1, value=default.overlap_threshold, step=0.05, label="Panoptic: lowest visible part")
        lowest = default.score_threshold
        has_instances = "instance" in segmenter.tasks
        score = gr.Slider(lowest, 1, value=lowest, step=0.05, label="Instance: lowest score", visible=has_instances)
        names = list(segmenter.base.info.class_names)
        classes = gr.Dropdown(names, value=[], multiselect=True, label="Classes (none: all)")
        precision = gr.Radio(list(PRECISIONS), value=default.precision, label="Precision")
    return opacity, [task, objects, overlap, score, classes, precision]


def _build_results() -> list[Any]:
    """What `_Handlers._show` fills, but for the state: picture, video, note, legend, three downloads, times."""
    picture = gr.Image(label="Result", interactive=False, buttons=["fullscreen"], format="png", alt_text="Overlay")
    video = gr.Video(label="Result", visible=False, interactive=False, buttons=[])
    note = gr.HTML("")
    with gr.Row():
        labels = ("Overlay, PNG", "Ids, PNG", "COCO, JSON")
        downloads = [gr.DownloadButton(label, interactive=False, size="sm", min_width=100) for label in labels]
    return [picture, video, note, gr.HTML(""), *downloads, gr.HTML("")]


def _connect(
    handlers: _Handlers, file: Any, camera: Any, run: Any, opacity: Any, settings: list[Any], outputs: list[Any]
) -> None:
    """Say which handler every control calls; one photograph at a time is in the network."""
    shown, picture, video, note, _, overlay, *_ = outputs
    network = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress_on": [picture, video]}
    start: dict[str, Any] = {"outputs": outputs, **network}
    file.upload(handlers.segment, [file, shown, opacity, *settings], api_name="segment", **start)
    run.click(handlers.segment, [file, shown, opacity, *settings], api_name=False, **start)
    camera.input(handlers.segment, [camera, shown, opacity, *settings], api_name=False, **start)
    task, objects, overlap, score, classes, precision = settings
    changed = [task.input, objects.release, overlap.release, score.release, classes.input, precision.input]
    newest: dict[str, Any] = {"api_name": False, "trigger_mode": "always_last"}
    gr.on(changed, handlers.change, [shown, opacity, *settings], **newest, **start)
    opacity.change(handlers.repaint, [shown, opacity], [picture, overlay], show_progress="hidden", **newest)
    picture.select(handlers.click, [shown], [note], api_name=False, show_progress="hidden")


class _Headers:
    """ASGI: adds `_HEADERS` to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = [(key.lower().encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        await self.app(scope, receive, with_headers)


def serve(segmenter: Segmenter, host: str, port: int, folder: Path) -> None:
    """Show the page until a signal ends it.

    Args:
        segmenter: does the work.
        host, port: where to listen.
        folder: of this process's temporary files, see `own_folder`.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    Image.MAX_IMAGE_PIXELS = -(-int(segmenter.limits.pixels) // 2)  # Pillow refuses twice as many
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page = build_page(segmenter, folder)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=int(segmenter.limits.megabytes * 1e6),
            state_session_capacity=SESSIONS,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(_Headers)]},
            theme=gr.themes.Default(**fonts),
            css=_CSS,
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"the page is at http://{shown}:{port}; Ctrl-C ends it", flush=True)
        while not segmenter.stopped.wait(0.5):  # without a limit, Ctrl-C would not end it on Windows
            pass
    finally:
        segmenter.stopped.set()
        page.close(verbose=False)
