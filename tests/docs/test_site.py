"""The site builds without a warning, and its pages load nothing from elsewhere."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_builds_strictly_and_needs_no_network(tmp_path):
    pytest.importorskip("zensical", reason="needs requirements-docs.txt")
    for name in ("docs", "pem_lightning"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.ckpt"))
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True)
    assert built.returncode == 0, built.stdout.decode() + built.stderr.decode()
    pages = [*(tmp_path / "site").glob("*.html")]
    assert {page.stem for page in pages} >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=\"?([^\" >]+)", text)
        loaded += [
            tag for tag in re.findall(r"<link\b[^>]*>", text) if not re.search(r"rel=\"?(canonical|prev|next)", tag)
        ]
        assert not [one for one in loaded if re.search(r"(https?:)?//", one)]
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text())
    assert "Predictor" in (tmp_path / "site" / "search.json").read_text()
