"""What the Markdown files hold: blocks, commands, links, headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("pem_lightning/assets/*.md")),
]
LANGUAGES = {"", "console", "text", "python", "yaml"}
"""Of blocks. Without a language every line is a command; in `console` those after a `$`, then their output."""

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks():
    """All of all pages, in order."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2])


def commands():
    """Every command line as its arguments, without comments and what a shell takes for itself; and where it stands."""
    for block in blocks():
        if block.language == "":
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from ((block.place, one) for one in _split(line))


def sessions():
    """Every command of the `console` blocks, and what it prints."""
    for block in blocks():
        if block.language == "console":
            for session in filter(None, re.split(r"^\$ ", block.text, flags=re.MULTILINE)):
                line, _, output = session.partition("\n")
                yield tuple(shlex.split(line)), output


def _split(line):
    """The arguments of each command of a line, which `&&` joins; variables before it are left out."""
    arguments = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            if arguments or not re.match(r"[A-Z_]+=", word):
                arguments.append(word)
        elif arguments:
            yield tuple(arguments)
            arguments = []


def prose(page):
    """A page without its blocks and its code in the line."""
    return re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))


def links(page):
    """Targets of links and pictures."""
    return re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", prose(page))


def anchors(page):
    """What GitHub, and the site, call the headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *#*$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)
