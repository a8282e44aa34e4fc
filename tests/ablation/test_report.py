"""The files of a report: what they say, and that nothing in them comes from or goes to elsewhere."""

import csv
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from pem_lightning.ablation import COLUMNS, Costs, Measurement, read_runs, tabulate, write_report
from pem_lightning.ablation.markdown import escape
from pem_lightning.ablation.measure import network_key
from pem_lightning.benchmark import Spread
from tests.ablation.conftest import write_run, write_sweep

EVIL = "<script>alert(1)</script>|`*x*`"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    sweep = write_sweep(folder / "sweep")
    write_run(sweep / "evil", f"+recipe.new='{EVIL}'", values=[50, 51, 52, 53])
    write_run(sweep / "unfinished", "ablation=no_csm", values=[50.0], steps=180)
    write_run(sweep / "unvalidated", "ablation=fpn", steps=20)
    write_run(sweep / "semantic", "task=semantic", values=[50, 51, 52, 53])
    tables = tabulate(read_runs([sweep]))
    costs = Costs(
        {network_key(tables[0].variants[0]): Measurement(16.9, 92.1, Spread(610, 620, 630, 640, 650))},
        {"size": [64, 96], "latency": True, "rounds": 5, "warmup": 1, "device": "X", "threads": 2, "torch": "2"},
    )
    write_report(tables, costs, folder / "report", "Made by <me>.")
    return folder / "report"


class Page(HTMLParser):
    """Collects what a browser would see."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture
def page(report):
    return Page((report / "report.html").read_text())


def test_the_page_is_well_formed_and_says_what_the_runs_say(page):
    text = "".join(page.text)
    for part in ("synthetic, panoptic, 600 steps", "71.0 ± 1.4", "−10.5", "630 (620–640)", "92.1", "180 of 600"):
        assert part in text, part
    assert "no CSM: unfinished; numbers are those after 150 steps." in text
    assert "FPN: no validation yet." in text
    assert "on X, threads: 2" in text
    assert page.tags.count("table") == 4  # variants and runs, of two tables
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_names_from_a_command_line_are_text(page, report):
    assert EVIL in "".join(page.text)
    assert page.tags.count("script") == 1
    assert "Made by <me>." in "".join(page.text)
    markdown = (report / "report.md").read_text()
    assert EVIL not in markdown
    assert escape(EVIL) in markdown


def test_the_page_loads_nothing(page, report):
    assert not re.search(r"(https?:)?//[a-z]", (report / "report.html").read_text().replace("// A click", ""))
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action"), tag
        if name == "href":
            assert value.startswith("#")
    policy = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy[0]


def test_every_column_can_be_sorted(page):
    heads = [value for tag, name, value in page.attributes if tag == "th" and (name, value) == ("scope", "col")]
    sorts = [value for _, name, value in page.attributes if name == "aria-sort"]
    assert len(sorts) == len(heads) == page.tags.count("button")
    firsts = [value for _, name, value in page.attributes if name == "data-first"]
    assert set(firsts) == {"ascending", "descending"}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium to click in")
def test_clicks_sort_in_a_browser_and_empty_cells_stay_last(report, tmp_path):
    names = {}
    for clicks in (1, 2):
        script = f"for (let i = 0; i < {clicks}; i++) document.querySelectorAll('th button')[1].click();"
        copy = report / f"clicked_{clicks}.html"
        copy.write_text((report / "report.html").read_text().replace("</body>", f"<script>{script}</script></body>"))
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
        profile = f"--user-data-dir={tmp_path / f'profile_{clicks}'}"
        command = [CHROMIUM, *options, profile, "--dump-dom", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        order = "descending" if clicks == 1 else "ascending"
        assert re.findall(r'<th [^>]*aria-sort="(?:de|a)scending"[^>]*>', done.stdout)[0].count(order) >= 1
        body = done.stdout.split("<tbody>")[1].split("</tbody>")[0]
        names[clicks] = re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', body)
    falling = ["PEM", "3 layers", "optimizer.lr=0.0003", "1 layer"]
    assert [name for name in names[1] if name in falling] == falling
    assert [name for name in names[2] if name in falling] == falling[::-1]
    assert names[1][-1] == names[2][-1] == "FPN"  # not validated


def test_drawings_in_the_page_are_well_formed(report):
    drawings = re.findall(r"<svg.*?</svg>", (report / "report.html").read_text(), flags=re.DOTALL)
    assert len(drawings) >= 4
    for drawing in drawings:
        ET.fromstring(drawing)


def test_markdown_has_tables_and_links_to_its_figures(report):
    text = (report / "report.md").read_text()
    links = re.findall(r"\]\((\S+\.png)\)", text)
    assert sorted(links) == sorted(path.name for path in report.glob("*.png"))
    assert "table1_depth.png" in links
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| PEM | 71.0 ± 1.4 | – |") for row in rows)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    first_table = [line for line in text.split("## ")[1].splitlines() if line.startswith("|")]
    assert len(first_table) == 2 + 7
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in first_table}) == 1


def test_the_csv_can_be_read_back(report):
    rows = list(csv.DictReader(io.StringIO((report / "report.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    by_name = {(row["task"], row["variant"]): row for row in rows}
    default = by_name["panoptic", "PEM"]
    assert float(default["PQ"]) == 71.0
    assert float(default["latency_ms"]) == 630
    assert (default["AP"], default["note"]) == ("", "")
    assert float(by_name["panoptic", "1 layer"]["difference"]) == -10.5
    assert by_name["panoptic", f"new={EVIL}"]["seeds"] == "1"
    assert by_name["panoptic", "FPN"]["PQ"] == ""
    assert float(by_name["semantic", "PEM"]["mIoU"]) == 53


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b", r"a\|b"), ("x_y*z", r"x\_y\*z"), ("<b>\n[l](u)", r"\<b\> \[l\](u)"), ("plain, 3.5", "plain, 3.5")],
)
def test_markdown_means_itself(text, expected):
    assert escape(text) == expected
