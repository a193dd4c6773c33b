"""evaluate_mmlu.py: both forms of the csv files, prompts, categories."""

import csv
import random
import shutil
from collections import Counter

import core
import evaluate_mmlu as mmlu
import pytest
from fake_models import FakeModel, check_scores, evaluate, load_items, pretend_hub
from loading import fail

SUBJECTS = ("abstract_algebra", "anatomy", "marketing")
COUNTS = {"test": 9, "dev": 6}
LETTERS = "ABCD"


def make_rows(subject: str, count: int) -> list[list]:
    rng = random.Random(subject)
    rows = []
    for i in range(count):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        question = f'{subject} {count}-{i}: what is "{a}, then {b}",\ntogether?'
        rows.append([question, *(a + b + k for k in range(4)), rng.choice(LETTERS)])
    return rows


def make_docs(subject: str, count: int) -> list[dict]:
    """Return the rows as the hub has them."""
    return [
        {"subject": subject, "question": q, "choices": options, "answer": LETTERS.index(letter)}
        for q, *options, letter in make_rows(subject, count)
    ]


def write_data(folder, with_header: bool):
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            rows = make_rows(subject, count)
            if with_header:
                rows = [[*row[:5], LETTERS.index(row[5])] for row in rows]
                rows.insert(0, ["question", *(f"choice{k}" for k in range(4)), "answer"])
            path = folder / split / f"{subject}_{split}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mmlu") / "data", with_header=False)


@pytest.mark.parametrize("mode", ["chat", "base"])
def test_scores(tiny_tokenizer, data, tmp_path, mode):
    options = ("--mode", mode, "--batch-size", "4")
    results = check_scores(mmlu, tiny_tokenizer, data, tmp_path, *options)
    assert results["categories"].keys() == {"STEM", "Others"}


def test_few_shot_prompt(data):
    prompt = load_items(mmlu, data, "--mode", "base")[0].prompt
    rows = make_rows("abstract_algebra", 6)[:5] + make_rows("abstract_algebra", 9)[:1]
    title, *parts = prompt.split("\n\n")
    assert title.endswith(" multiple choice questions (with answers) about abstract algebra.")
    for part, row, answer in zip(parts, rows, [*(f" {r[5]}" for r in rows[:5]), ""], strict=True):
        options = "".join(f"\n{c}. {row[k]}" for k, c in enumerate(LETTERS, start=1))
        assert part == f"{row[0]}{options}\nAnswer:{answer}"


def test_zero_shot_prompts(tiny_tokenizer, data, tmp_path):
    """As C-Eval's, in English."""
    model = FakeModel(tiny_tokenizer, reply=lambda text: "Because.")
    evaluate(mmlu, model, tiny_tokenizer, data, tmp_path)
    end = "Because.\nTherefore, among A through D, the answer is\n\n答："
    assert all(prompt.endswith(end) for prompt in model.forward_calls[0])


def test_all_forms_of_the_data_are_the_same_items(data, tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config) == ("cais/mmlu", "all")
        return [doc for subject in SUBJECTS for doc in make_docs(subject, COUNTS[split])]

    pretend_hub(monkeypatch, load_dataset)
    items = load_items(mmlu, data, "--mode", "base")
    assert len(items) == 27
    with_header = write_data(tmp_path / "header", with_header=True)
    for form in (with_header, data.parent, "cais/mmlu"):
        assert load_items(mmlu, form, "--mode", "base") == items


def test_the_published_averages_are_those_of_their_categories(evaldata):
    """Weighted by the numbers of questions, with anatomy in STEM."""
    counts = Counter(item.category for item in load_items(mmlu, evaldata / "mmlu"))
    assert counts.total() == 14042
    published = {45.46: (40.06, 51.61, 41.23, 51.24), 47.86: (41.20, 54.44, 43.66, 54.46)}
    for average, categories in published.items():
        hits = [a * counts[name] for a, name in zip(categories, core.CATEGORIES, strict=True)]
        assert round(sum(hits) / 14042, 2) == average


@pytest.mark.parametrize("missing", ["test", "dev", ""])
def test_missing_data_is_one_line(tmp_path, missing):
    data = write_data(tmp_path / "data", with_header=False)
    shutil.rmtree(data / missing)
    message = fail(mmlu.main, ["--data", str(data), "--mode", "base"])
    assert "https://github.com/hendrycks/test" in message


HEADERS = {  # header: a row that is the question q with the options 1 to 4 and the answer C
    "": "q,1,2,3,4,C",
    "question,A,B,C,D,answer": "q,1,2,3,4,C",
    "question,a,b,c,d,answer": "q,1,2,3,4,2",
    "Question,A,B,C,D,Answer": "q,1,2,3,4, c ",
    "\ufeffinput,A,B,C,D,target": "q,1,2,3,4,C",
    '"answer","D","C","B","A","question"': '"2","4","3","2","1","q"',
    ",question,subject,choice0,choice1,choice2,choice3,answer": "0,q,law,1,2,3,4,2.0",
    "question,choice_1,choice_2,choice_3,choice_4,answer": "q,1,2,3,4,3",
    "question,Option A,Option B,Option C,Option D,answer": "q,1,2,3,4,C",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers(tmp_path, header):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n{HEADERS[header]}\n\n", "utf-8")
    assert mmlu.read_rows(path) == [["q", "1", "2", "3", "4", "C"]]


@pytest.mark.parametrize("end", ["4,7", "4,-1", "4,E", "4,1.5", "4,", "", "4,B,5"])
def test_a_damaged_row_is_named(tmp_path, end):
    path = tmp_path / "x.csv"
    path.write_text(f"\nquestion,a,b,c,d,answer\nq,1,2,3,4,2\nq,1,2,3,{end}\n", "utf-8")
    message = fail(mmlu.read_rows, path)
    assert "x.csv, row 2: " in message and "\n" not in message
    assert repr(end.partition(",")[2]) in message or "cells instead of 6" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("question,A,B,C,answer\nq,1,2,3,A", "the header is question,A,B,C,answer: it needs"),
        ("question,A,B,C,D,answer,answer\n", "the header is question,A,B,C,D,answer,answer: "),
        ("q,1,2,3,4,2\n", "row 1: the answer is '2' and must be one of A, B, C, D."),
    ],
)
def test_a_header_that_is_unclear_is_named(tmp_path, text, expected):
    path = tmp_path / "x.csv"
    path.write_text(text, "utf-8")
    assert expected in fail(mmlu.read_rows, path)
