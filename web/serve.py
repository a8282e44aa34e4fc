"""Serve a folder on 127.0.0.1 with the headers that WebAssembly's threads need: `python web/serve.py [FOLDER] [PORT]`.

Any web server will do; without these two headers the page runs on one thread.
"""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",  # a page that was built anew is seen at once
}


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, each with `HEADERS`."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",  # which the registry of Windows may say otherwise
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Add the headers to every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal stays readable."""


def make_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of this machine alone; port 0 is any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main() -> int:
    """Run the command; returns its exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("dist")
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    try:
        server = make_server(folder, port)
    except OSError as error:
        print(f"error: port {port} cannot be used ({error.strerror}): make web PORT=8001", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
