"""evaluate_mmlu.py: both forms of the csv files, prompts, categories."""

import csv
import random
import shutil

import core
import evaluate_mmlu as mmlu
import pytest
from fake_models import FakeModel, evaluate, last_question, load_items, pretend_hub

SUBJECTS = ("abstract_algebra", "anatomy", "marketing")
LETTERS = "ABCD"


def make_rows(subject: str, count: int) -> list[list]:
    rng = random.Random(subject)
    rows = []
    for i in range(count):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        question = f'{subject} {count}-{i}: what is "{a}, then {b}",\ntogether?'
        rows.append([question, *(a + b + k for k in range(4)), rng.choice(LETTERS)])
    return rows


def write_data(folder, with_header: bool):
    for split, count in (("test", 9), ("dev", 6)):
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
def test_oracle_and_always_c(tiny_tokenizer, data, tmp_path, mode):
    items = load_items(mmlu, data)
    answers = {item.prompt: item.answer for item in items}
    oracle = FakeModel(tiny_tokenizer, letter=lambda text: last_question(text, answers))
    options = ("--mode", mode, "--batch-size", "4")
    right = evaluate(mmlu, oracle, tiny_tokenizer, data, tmp_path / "1", *options)
    assert right["accuracy"] == 100 and right["categories"] == {"STEM": 100, "Others": 100}
    model = FakeModel(tiny_tokenizer)
    always_c = evaluate(mmlu, model, tiny_tokenizer, data, tmp_path / "2", *options)
    share = sum(item.answer == "C" for item in items) / len(items)
    assert always_c["accuracy"] == pytest.approx(100 * share) and 0 < share < 1


def test_few_shot_prompt(tiny_tokenizer, data, tmp_path):
    model = FakeModel(tiny_tokenizer)
    evaluate(mmlu, model, tiny_tokenizer, data, tmp_path, "--mode", "base", "--order", "file")
    assert not model.generate_calls
    blocks = model.forward_calls[0][0].split("\n\n")
    title = "The following are multiple choice questions (with answers) about abstract algebra."
    assert blocks[0] == title and len(blocks) == 7
    for block, row in zip(blocks[1:6], make_rows("abstract_algebra", 6), strict=False):
        options = "".join(f"\n{c}. {row[k]}" for k, c in enumerate(LETTERS, start=1))
        assert block == f"{row[0]}{options}\nAnswer: {row[5]}"
    assert blocks[6].startswith(make_rows("abstract_algebra", 9)[0][0])
    assert blocks[6].endswith("\nAnswer:")


def test_zero_shot_prompts(tiny_tokenizer, data, tmp_path):
    """As C-Eval's, in English."""
    model = FakeModel(tiny_tokenizer, reply=lambda text: "Because.")
    evaluate(mmlu, model, tiny_tokenizer, data, tmp_path)
    (prompts, settings), *_ = model.generate_calls
    assert settings == {"do_sample": False, "max_new_tokens": 512}
    question = prompts[0].removeprefix("[Round 1]\n\n问：").removesuffix("\n\n答：")
    assert model.forward_calls[0][0] == (
        f"[Round 1]\n\n问：{question}Because.\nTherefore, among A through D, the answer is\n\n答："
    )


def test_all_forms_of_the_data_are_the_same_items(data, tmp_path, monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config) == ("cais/mmlu", "all")
        return [
            {"subject": s, "question": q, "choices": options, "answer": LETTERS.index(letter)}
            for s in SUBJECTS
            for q, *options, letter in make_rows(s, {"test": 9, "dev": 6}[split])
        ]

    pretend_hub(monkeypatch, load_dataset)
    with_header = write_data(tmp_path / "header", with_header=True)
    items = load_items(mmlu, data, "--mode", "base")
    assert len(items) == 27
    assert items == load_items(mmlu, with_header, "--mode", "base")
    assert items == load_items(mmlu, data.parent, "--mode", "base")
    assert items == load_items(mmlu, "cais/mmlu", "--mode", "base")


def test_the_published_averages_are_those_of_their_categories(evaldata):
    """Weighted by the numbers of questions, with anatomy in STEM."""
    counts = dict.fromkeys(core.CATEGORIES, 0)
    for item in load_items(mmlu, evaldata / "mmlu"):
        counts[item.category] += 1
    assert sum(counts.values()) == 14042
    published = {45.46: (40.06, 51.61, 41.23, 51.24), 47.86: (41.20, 54.44, 43.66, 54.46)}
    for average, categories in published.items():
        hits = sum(a * b for a, b in zip(categories, counts.values(), strict=True))
        assert round(hits / 14042, 2) == average


@pytest.mark.parametrize("missing", ["test", "dev", ""])
def test_missing_data_is_one_line(tmp_path, missing):
    data = write_data(tmp_path / "data", with_header=False)
    shutil.rmtree(data / missing)
    with pytest.raises(SystemExit, match=r"https://github\.com/hendrycks/test") as error:
        mmlu.main(["--data", str(data), "--mode", "base"])
    assert "\n" not in str(error.value)


def test_a_blank_first_line_is_no_row(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\nq,1,2,3,4,B\n", "utf-8")
    assert mmlu.read_rows(path) == [["q", "1", "2", "3", "4", "B"]]


@pytest.mark.parametrize("end", ["4,7", "4,-1", "4,B", "4,", ""])
def test_a_damaged_row_is_named(tmp_path, end):
    path = tmp_path / "x.csv"
    path.write_text(f"question,a,b,c,d,answer\nq,1,2,3,4,2\nq,1,2,3,{end}\n", "utf-8")
    with pytest.raises(SystemExit, match=r"x\.csv, row 2: "):
        mmlu.read_rows(path)
