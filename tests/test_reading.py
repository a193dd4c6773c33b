"""reading.py: files that are missing, damaged or of another benchmark end in one line."""

import sys

import pytest
import reading
from reading import Item


@pytest.mark.parametrize("read", [reading.read_text, reading.read_csv, reading.read_json_lines])
def test_unreadable_files(tmp_path, read):
    with pytest.raises(SystemExit, match=r"^.*: Is a directory\.$"):
        read(tmp_path)
    with pytest.raises(SystemExit, match=r"^.*: No such file or directory\.$"):
        read(tmp_path / "none")
    (tmp_path / "gbk").write_bytes('["答案"]\n'.encode("gbk"))
    with pytest.raises(SystemExit, match=r"^.*gbk is damaged .*utf-8.*\): "):
        read(tmp_path / "gbk")


def test_a_csv_field_beyond_the_limit(tmp_path):
    (tmp_path / "x.csv").write_text("a," + "b" * 200_000)
    with pytest.raises(SystemExit, match=r"x\.csv is damaged \(field larger .*\): download"):
        reading.read_csv(tmp_path / "x.csv")


@pytest.mark.parametrize("row", [["answer"], "answer", 1, None, {"answer": 1}, {"question": "?"}])
def test_a_row_of_another_benchmark(tmp_path, row):
    rows = [{"answer": "1"}, row]
    with pytest.raises(SystemExit, match="x, item 2: there is no answer; is it another"):
        reading.check_fields(tmp_path / "x", rows, answer=str)


def test_a_second_item_of_one_key():
    items = [Item("law", "1", "x", "C"), Item("law", "1", "y", "C")]
    with pytest.raises(SystemExit, match="item law/1 is there 2 times"):
        reading.select(items, None, None)
    with pytest.raises(SystemExit, match="the files are empty"):
        reading.select([], None, None)


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        reading.load_hub("cais/mmlu", "all", "test")
