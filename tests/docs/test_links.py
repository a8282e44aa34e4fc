"""Links of all pages lead somewhere, on GitHub and on the site."""

import re

import pytest

from tests.docs.pages import LANGUAGES, PAGES, ROOT, anchors, blocks, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_anchors(page):
    for link in links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
        if page.parent.name == "docs":
            assert target.is_relative_to(ROOT / "docs"), f"{link} is not part of the site: name the file instead"


def test_anchors_are_githubs(tmp_path):
    (page := tmp_path / "page.md").write_text("# A `b`, c & d_e\n## Two\n### [Two](x.md)\n```\n# none\n```\n")
    assert anchors(page) == {"a-b-c--d_e", "two", "two-1"}


def test_blocks_say_what_they_are():
    assert {block.language for block in blocks()} <= LANGUAGES


def test_every_page_is_in_the_navigation_and_in_the_readme():
    navigation = (ROOT / "mkdocs.yml").read_text()
    readme = links(ROOT / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
        assert f"docs/{page.name}" in readme
