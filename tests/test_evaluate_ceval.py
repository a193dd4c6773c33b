"""evaluate_ceval.py: the released protocol step by step, the data's forms, the submission."""

import csv
import json
import random
import re
from dataclasses import replace
from itertools import chain
from unittest.mock import MagicMock, Mock

import core
import evaluate_ceval as ceval
import pytest
import torch
from fake_models import (
    FakeModel,
    check_scores,
    evaluate,
    load_items,
    pretend_hub,
    read_records,
    write_lines,
)
from loading import fail

SUBJECTS = {"STEM": ["college_physics", "operating_system"], "Humanities": ["law"]}
LETTERS = "ABCD"
HEADER = "id,question,A,B,C,D,answer\n"
PROCESSED = '{"id": 0, "inputs_pretokenized": "q", "targets_pretokenized": '


@pytest.fixture
def short_reasoning(monkeypatch):
    """The bundled model rambles at times; that it gets 512 tokens is tested with a fake one."""
    monkeypatch.setattr(core, "MAX_NEW_TOKENS", 40)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def make_rows(subject: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(f"{subject} {seed}")
    rows = []
    for i in range(count):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        options = {letter: str(a + b + k) for k, letter in enumerate(LETTERS)}
        more = "再加零" * rng.randint(0, 30)
        question = f"{subject}题{seed}-{i}：{a} 与 {b} 之和{more}是____"
        rows.append({"id": i, "question": question, **options, "answer": rng.choice(LETTERS)})
    return rows


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with csv files as the official ones: 9 questions a subject, 6 examples."""
    folder = tmp_path_factory.mktemp("official")
    for subject in chain(*SUBJECTS.values()):
        rows = make_rows(subject, 9, 0)
        write_rows(folder / "val" / f"{subject}_val.csv", rows)
        write_rows(folder / "dev" / f"{subject}_dev.csv", make_rows(subject, 6, 1))
        unanswered = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
        write_rows(folder / "test" / f"{subject}_test.csv", unanswered)
    return folder


def process(row: dict) -> dict:
    """Return a row of the official csv as the processed data has it."""
    return {
        "id": int(row["id"]),
        "inputs_pretokenized": row["question"] + "".join(f"\n{c}. {row[c]}" for c in LETTERS),
        "choices_pretokenized": [f" {letter}" for letter in LETTERS],
        "label": LETTERS.index(row["answer"]),
        "targets_pretokenized": [row["answer"]],
    }


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """The same as jsonl, in the processed data's folders."""
    folder = tmp_path_factory.mktemp("work") / "CEval"
    for category, subjects in SUBJECTS.items():
        for subject in subjects:
            path = folder / "val" / category / f"{subject}.jsonl"
            write_lines(path, map(process, make_rows(subject, 9, 0)))
    return folder


def test_the_protocol_of_the_released_script(
    tiny_model, tiny_tokenizer, processed, tmp_path, short_reasoning
):
    """Steps 1 to 5 written out, file after file in batches of 8."""

    def encode(questions):
        prompts = [f"[Round 1]\n\n问：{question}\n\n答：" for question in questions]
        options = {"padding": True, "return_tensors": "pt", "truncation": True, "max_length": 2048}
        return tiny_tokenizer(prompts, **options)

    results = evaluate(ceval, tiny_model, tiny_tokenizer, processed, tmp_path)
    records, hits = read_records(tmp_path), []
    letter_ids = [tiny_tokenizer.encode(c, add_special_tokens=False)[0] for c in LETTERS]
    for path in sorted(processed.glob("val/**/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for batch in (rows[:8], rows[8:]):
            inputs = encode(row["inputs_pretokenized"] for row in batch)
            with torch.no_grad():
                outputs = tiny_model.generate(**inputs, do_sample=False, max_new_tokens=40)
            reasonings = tiny_tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
            inputs = encode(
                f"{row['inputs_pretokenized']}{reasoning}\n综上所述，ABCD中正确的选项是："
                for row, reasoning in zip(batch, reasonings, strict=True)
            )
            with torch.no_grad():
                logits = tiny_model(**inputs, return_last_logit=True).logits[:, -1, letter_ids]
            for row, reasoning, choice in zip(batch, reasonings, logits.argmax(-1), strict=True):
                record = records[f"{path.stem}/{row['id']}"]
                assert record["output"] == reasoning and reasoning
                assert record["prediction"] == LETTERS[choice]
                hits.append(int(choice) == row["label"])
    share = sum(hits) / len(hits)
    assert results["accuracy"] == pytest.approx(100 * share) and 0 < share < 1


def test_batches_of_any_kind_give_the_predictions_of_single_questions(
    tiny_model, tiny_tokenizer, processed, tmp_path, short_reasoning
):
    kinds = {"single": ("--batch-size", "1"), "file": (), "length": ("--order", "length")}
    for name, options in kinds.items():
        options = ("--limit", "5", *options)
        evaluate(ceval, tiny_model, tiny_tokenizer, processed, tmp_path / name, *options)
    single, file, length = (read_records(tmp_path / name) for name in kinds)
    assert single == file == length and len(single) == 15


def test_both_prompts_are_cut_to_2048_tokens(tiny_tokenizer):
    """As the original: where the reasoning is too long, the extraction prompt is cut off."""
    model, lengths = FakeModel(tiny_tokenizer, reply=lambda text: "很长的理由。" * 1000), []
    read = model.read
    model.read = lambda ids, mask: lengths.append(ids.shape[1]) or read(ids, mask)
    items = [core.Item("law", "0", "问题" * 3000, "A")]
    core.answer_choices(model, tiny_tokenizer, "chat", items, "所以：", "")
    assert lengths == [2048, 2048]
    assert "所以" not in model.forward_calls[0][0]


@pytest.mark.parametrize("mode", ["chat", "base"])
def test_scores(tiny_tokenizer, official, tmp_path, mode):
    options = ("--mode", mode, "--batch-size", "4")
    results = check_scores(ceval, tiny_tokenizer, official, tmp_path, *options)
    assert results["categories"].keys() == SUBJECTS.keys()


def test_few_shot_prompt(official, tiny_tokenizer, tmp_path):
    """Five examples of the subject, each with its letter, then the question."""
    model = FakeModel(tiny_tokenizer)
    options = ("--mode", "base", "--subjects", "law", "--limit", "1")
    evaluate(ceval, model, tiny_tokenizer, official, tmp_path, *options)
    rows = make_rows("law", 6, 1)[:5] + make_rows("law", 9, 0)[:1]
    title, *parts = model.forward_calls[0][0].split("\n\n")
    assert title == "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。"
    for part, row, answer in zip(parts, rows, [*(r["answer"] for r in rows[:5]), ""], strict=True):
        assert part == f"{process(row)['inputs_pretokenized']}\n答案：{answer}"
    assert not model.generate_calls


def test_the_letter_after_its_lead_is_another_token(official_tokenizer):
    """Chat: the original's ids of "A" to "D"; few-shot: those that stand in the examples."""
    seen = []
    logits = MagicMock()
    logits.__getitem__ = lambda self, key: seen.append(key[-1]) or torch.zeros(1, 4)
    model = Mock(device="cpu", return_value=Mock(logits=logits))
    for lead in ("", "答案："):
        core.choose(model, official_tokenizer, ["x"], lead)
    assert seen[0] == [316, 347, 319, 367]
    assert [official_tokenizer.convert_ids_to_tokens(i) for i in seen[1]] == list(LETTERS)


def test_the_test_split_is_submitted_and_not_scored(tiny_tokenizer, official, tmp_path):
    model, options = FakeModel(tiny_tokenizer), ("--split", "test", "--limit", "2")
    results = evaluate(ceval, model, tiny_tokenizer, official, tmp_path, *options)
    assert "accuracy" not in results and not (tmp_path / "results.md").exists()
    submission = json.loads((tmp_path / "submission.json").read_text("utf-8"))
    assert submission == {subject: {"0": "C", "1": "C"} for subject in chain(*SUBJECTS.values())}


def key(item) -> str:
    return item.key


def test_both_forms_of_the_data_are_the_same_items(official, processed):
    items = [sorted(load_items(ceval, data), key=key) for data in (official, processed)]
    assert items[0] == items[1] and {item.category for item in items[0]} == set(SUBJECTS)


def test_both_forms_of_the_real_data_are_the_same_items(evaldata):
    """The csv files of the test data lack the carriage returns of 19 questions."""
    official, processed = (load_items(ceval, evaldata / name) for name in ("ceval/csv", "ceval"))
    processed = [replace(item, prompt=item.prompt.replace("\r", "")) for item in processed]
    assert sorted(official, key=key) == sorted(processed, key=key) and len(official) == 1346


def test_the_subjects_have_the_folders_of_the_processed_data(evaldata):
    mapping = json.loads((evaldata / "ceval" / "subject_mapping.json").read_text("utf-8"))
    renamed = {"Social Science": "Social Sciences", "Other": "Others"}
    names = {subject: chinese for subject, (_, chinese, _) in mapping.items()}
    categories = {subject: renamed.get(c, c) for subject, (_, _, c) in mapping.items()}
    assert (names, categories) == (ceval.CHINESE_NAME, ceval.CATEGORY)


def test_carriage_returns_of_the_official_csv_are_kept(tmp_path):
    row = {"id": 0, "question": "①甲\r\n②乙", **dict.fromkeys(LETTERS, "x"), "answer": "D"}
    write_rows(tmp_path / "val" / "law_val.csv", [row])
    (item,) = load_items(ceval, tmp_path)
    assert item.prompt == "①甲\r\n②乙\nA. x\nB. x\nC. x\nD. x" and item.answer == "D"


def test_by_name_from_the_hub(monkeypatch):
    """Each subject is a configuration of the data set."""
    splits = {"val": 0, "dev": 1}
    pretend_hub(monkeypatch, lambda name, config, split: make_rows(config, 6, splits[split]))
    items = load_items(ceval, "ceval/ceval-exam", "--mode", "base")
    assert len(items) == 52 * 6 and len({item.key for item in items}) == 52 * 6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("nowhere", "--data nowhere: there is no such file or folder: get the processed.*https://"),
        ("{empty}", "has neither .*https://"),
        ("{data} --mode base", "no folder dev .* official csv files have it: https://"),
        ("{data} --subjects physics law", "--subjects physics: the data has college_physics, law"),
    ],
)
def test_missing_data_is_one_line(processed, tmp_path, flags, expected):
    flags = flags.format(empty=tmp_path, data=processed).split()
    assert re.search(expected, fail(ceval.main, ["--data", *flags]))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("law_val.csv", "a,b\n1,2\n", "item 1: there is no id, question, A, B, C, D"),
        ("law_val.csv", HEADER + "0,q,1,2\n", "item 1: there is no C, D"),
        ("law_val.csv", HEADER + "0,q,1,2,3,4,E\n", "'E' is not A, B, C or D"),
        ("law_val.csv", HEADER + "x,q,1,2,3,4,A\n", "id 'x' is not a number"),
        ("law_val.csv", HEADER + "0,q,1,2,3,4,\n", "0 of law has no answer"),
        ("law.jsonl", "[1]\n", "there is no id, inputs_pretokenized"),
        ("law.jsonl", PROCESSED + '["AB"]}\n', "item 1: the answer 'AB' is not"),
        ("STEM/law.jsonl", PROCESSED + '["A"]}\n', "law.jsonl: there is another file of law"),
    ],
)
def test_damaged_or_foreign_data_is_one_line(tmp_path, name, text, expected):
    (tmp_path / "val" / "STEM").mkdir(parents=True)
    for place in {name, name.rpartition("/")[2]}:  # also beside the folder of a category
        (tmp_path / "val" / place).write_text(text, "utf-8")
    assert expected in fail(ceval.main, ["--data", str(tmp_path)])
