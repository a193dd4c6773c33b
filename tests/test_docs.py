"""The documentation: its generated tables are current, its links resolve, its length is limited."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import generate

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "evaluation" / "README.md", ROOT / "resources" / "chatglm2-tiny" / "README.md"]
MAX_LINES = {"README.md": 380, "README_ZH.md": 380, "FAQ.md": 220, "docs/faq_zh.md": 220}


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


@pytest.mark.parametrize("name", MAX_LINES)
def test_length(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= MAX_LINES[name]


@pytest.mark.parametrize(
    ("name", "to"), [("README.md", "to"), ("README_ZH.md", "到"), ("docs/development.md", "to")]
)
def test_the_range_of_transformers_is_named(name, to):
    from chatglm2.configuration_chatglm import TRANSFORMERS_RANGE

    words = " ".join((ROOT / name).read_text("utf-8").split())
    assert f"transformers {f' {to} '.join(TRANSFORMERS_RANGE)}" in words


def test_a_table_is_written_anew():
    page = (ROOT / "docs" / "web.md").read_text("utf-8")
    emptied = re.sub(r"(<!-- flags .*? -->\n).*?(<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
    assert "| `--share` |" in page and "| `--share` |" not in emptied
    assert "--model MODEL" not in page  # cli_demo.py has it too
    assert generate.MARKED.sub(generate.make_table, emptied) == page
