"""FAQ.md: twenty entries with messages and cures in both languages; its code runs.

Its links and commands are checked with those of the READMEs, in test_readme.py.
"""

import re

import pytest
from conftest import ROOT
from test_readme import blocks

TEXT = (ROOT / "FAQ.md").read_text("utf-8")
INDEX, *ENTRIES = re.split(r"^### Q\d+\n", TEXT, flags=re.MULTILINE)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_the_index_names_every_entry():
    numbers = [int(number) for number in re.findall(r"^### Q(\d+)$", TEXT, re.MULTILINE)]
    assert numbers == list(range(1, 21))
    titles = [re.match(r"\n\*\*(.+)\*\*\n", entry)[1] for entry in ENTRIES]
    assert re.findall(r"^- \[Q\d+\]\(#q\d+\) (.+)$", INDEX, re.MULTILINE) == titles
    assert re.findall(r"^- \[Q(\d+)\]\(#q\1\)", INDEX, re.MULTILINE) == [*map(str, numbers)]


@pytest.mark.parametrize("number", range(1, 21))
def test_each_entry_has_a_message_and_a_tried_cure_in_both_languages(number):
    entry = ENTRIES[number - 1]
    assert len(blocks(entry, "text")) == 1
    prose = re.sub(r"```.*?```|^\n\*\*.*?\*\*\n", "", entry, flags=re.DOTALL)
    chinese, english = [part for part in prose.split("\n\n") if part.strip()]
    assert CHINESE.search(chinese) and "试过" in chinese
    assert len(CHINESE.findall(english)) < 10 and re.search(r"[Tt]ried", english)


def test_both_readmes_link_the_entry_on_openmp():
    for name in ("README.md", "README_ZH.md"):
        assert "(FAQ.md#q1)" in (ROOT / name).read_text("utf-8")


def test_python_blocks_run(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one block saves a model
    source = "\n".join(blocks(TEXT, "python"))
    assert "THUDM/chatglm2-6b" in source and source.count("assert") == 3
    source = source.replace("THUDM/chatglm2-6b", str(tiny_checkpoint))
    exec(compile(source, "FAQ.md", "exec"), {})
