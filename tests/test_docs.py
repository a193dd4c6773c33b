"""The documentation: its generated tables are current and its links resolve."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import generate

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / x / "README.md" for x in ("evaluation", "ptuning", "resources/chatglm2-tiny")]


def find_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_tables_are_current(capsys):
    is_stale = generate.main(["--check"])
    assert not is_stale, capsys.readouterr().out + "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = page.read_text("utf-8")
    for link in re.findall(r"""\]\(([^)\s]+)\)|src="(.+?)\"""", text):
        file, _, anchor = "".join(link).partition("#")
        if file.startswith(("http://", "https://", "mailto:")):
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in find_anchors(target.read_text("utf-8")), link


def test_a_table_is_written_anew():
    page = (ROOT / "docs" / "web.md").read_text("utf-8")
    emptied = re.sub(r"(<!-- flags .*? -->\n).*?(<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
    assert "| `--share` |" in page and "| `--share` |" not in emptied
    assert "--model MODEL" not in page  # cli_demo.py has it too
    assert generate.MARKED.sub(generate.make_table, emptied) == page
