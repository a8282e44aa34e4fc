"""Put the page together in web/dist: its files, ONNX Runtime's and a network.

    python web/build.py [EXPORTED.onnx]    # by default checkpoint=camvid, which is exported first

What is there and newer than its source is left as it is. Needs npm, and for the export requirements-export.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

WEB = Path(__file__).resolve().parent
DIST = WEB / "dist"
ORT = WEB / "node_modules" / "onnxruntime-web"
PAGE = ("index.html", "style.css", "app.js", "worker.js", "pem.js", "postprocess.js", "files.js", "draw.js")
RUNTIME = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
EXPORT = ("checkpoint=camvid", "format=onnx", "precision=float16")


def main() -> int:
    """Run the command; returns its exit code."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if given and not given.is_file():
        print(f"error: {given} does not exist: export.py writes exported files", file=sys.stderr)
        return 2
    if not ORT.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            print("error: npm is missing, which brings ONNX Runtime for browsers: install Node.js", file=sys.stderr)
            return 2
        if code := subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=WEB).returncode:
            return code
    copy_page(DIST)
    model = DIST / "model.onnx"
    if given:
        shutil.copyfile(given, model)
    elif not model.is_file() or model.stat().st_mtime < checkpoint().stat().st_mtime:
        command = [sys.executable, "export.py", *EXPORT, f"output={model}"]
        if code := subprocess.run(command, cwd=WEB.parent).returncode:
            return code
    print(f"{DIST}: {sum(file.stat().st_size for file in DIST.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    return 0


def checkpoint() -> Path:
    """The network that ships."""
    return WEB.parent / "pem_lightning" / "assets" / "pem_lite0_camvid.ckpt"


def copy_page(folder: Path) -> None:
    """All but the network."""
    (folder / "ort").mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copyfile(WEB / name, folder / name)
    for name in RUNTIME:
        shutil.copyfile(ORT / "dist" / name, folder / "ort" / name)


if __name__ == "__main__":
    sys.exit(main())
