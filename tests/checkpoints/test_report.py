"""The table, its lines in a log, and what they say about many names."""

import io
import logging

import pytest
from rich.console import Console

from pem_lightning.checkpoints.pretrained import LoadReport, show_report, summarize
from pem_lightning.types import UserError

REPORT = LoadReport(
    "a.pth",
    "torchvision or timm ResNet",
    loaded=["backbone.conv1.weight"],
    reinitialized=["transformer_decoder.class_head.bias"],
    missing=[f"pixel_decoder.{i}" for i in range(7)] + ["transformer_decoder.x"],
    mismatched={"transformer_decoder.query_features.weight": ([100, 256], [50, 256])},
    unexpected=["fc.weight", "fc.bias"],
)


def test_a_terminal_gets_a_table():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    show_report(REPORT, console)
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["a.pth:", "torchvision", "or", "timm", "ResNet"] in lines
    assert ["loaded", "1", "backbone.conv1.weight"] in lines
    assert ["class", "head,", "re-initialised", "1", "transformer_decoder.class_head.bias"] in lines
    assert ["missing,", "stay", "random", "8", "pixel_decoder.*", "7,", "transformer_decoder.x"] in lines
    assert ["unexpected,", "not", "used", "2", "fc.weight,", "fc.bias"] in lines
    assert any("[100, 256] for [50, 256]" in " ".join(line) for line in lines)


def test_a_log_gets_lines_and_at_debug_every_name(caplog):
    console = Console(file=io.StringIO())
    with caplog.at_level(logging.DEBUG, logger="pem_lightning.checkpoints.pretrained"):
        show_report(REPORT, console)
    assert console.file.getvalue() == ""
    infos = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert infos[0].startswith("weights from a.pth (torchvision or timm ResNet): loaded: 1; class head, re-init")
    assert "missing, stay random: 8 (pixel_decoder.* 7, transformer_decoder.x)" in infos
    debugs = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert [line for line in debugs if line.startswith("missing")] == [
        f"missing, stay random: {name}" for name in REPORT.missing
    ]


def test_nothing_loaded_is_said():
    assert LoadReport("a", "b").rows() == {"loaded": []}
    assert summarize([]) == "none"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.b", "a.c", "d", "e"], "a.b, a.c, d, e"),
        (["a.b", "a.c", "d.e", "a.f", "a.g"], "a.* 4, d.e"),
        (["a", "b", "c", "d", "e"], "a, b, c, d, ..."),
        (
            [f"{part}.{i}" for part in "abcdefghi" for i in (0, 1)],
            ", ".join(f"{part}.* 2" for part in "abcdefgh") + ", ...",
        ),
    ],
)
def test_many_names_are_counted_by_part(names, text):
    assert summarize(names) == text


def test_only_the_backbone_has_to_be_covered():
    REPORT.check_backbone()
    report = LoadReport("a", "b", mismatched={"backbone.x": ([1], [2])}, hint="do this")
    with pytest.raises(UserError, match=r"\(backbone\.x has shape \[1\] instead of \[2\]; 1 differences\): do this"):
        report.check_backbone()
