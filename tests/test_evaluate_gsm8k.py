"""evaluate_gsm8k.py: extraction from hard outputs, prompts, data."""

import re
from pathlib import Path

import evaluate_gsm8k as gsm8k
import pytest
import reading
from fake_models import FakeModel, evaluate, last_question, load_items, pretend_hub, write_lines
from loading import fail

QUESTIONS = {
    "Ann has 3 pens and buys 4. How many has she?": "7",
    "A car costs $1,150 and a bike 50. What do both cost?": "1,200",
    "It is 3 degrees, then 5 less. What is it?": "-2",
}
EXTRACTED = {
    "": ["I do not know.", "", "The answer is"],
    "-7": ["The answer is -7.", "The answer is \u22127.", "The answer is －７。"],
    "0.5": ["The answer is $.50", "The answer is .5", "It costs 0.5 dollars"],
    "5": ["The answer is 5. The answer is 9.", "The answer is 5 (= all).", "In the list 3,4,5"],
    "6": ["So 21-15=6", "The garden has 6 m²."],
    "7": [
        "所以他一共有 3 + 4 = 7 个苹果。答案是7个。",
        "The answer is 10-3=7",
        "The answer is 2 x 3 = 6 and 6 + 1 = 7. Check: 7 = 8 - 1",
    ],
    "9": ["The answer is clear.\nIt is 12 kilometres, 3 more than 9"],
    "11": ["5 + 6 = 11. The answer is 11.", "The answer is 5 + 6 = 11."],
    "12": ["答案为 １２ 元", "the answer is: **12** apples"],
    "18": ["The answer is approx. 18 of 20", "The answer is...18", "The answer is:\n\n**18**"],
    "20": ["The answer is 20%. That is 5 of 25.", "The answer is 20.00 dollars."],
    "48": ["She has 8 boxes of 6, that is 48 eggs."],
    "8000": [
        *(
            f"The answer is {n}."
            for n in (r"8{,}000", r"\$8,000", "8 000", "8\u202f000.0", "８，０００")
        ),
        *(
            rf"So $x = 8\,000$, that is 4 \times 2\;000. {end}"
            for end in (r"\boxed{8{,}000}", "= 8 000")
        ),
        r"$$\boxed{\text{\$8~000}}$$ in 2 years",
        "She pays 4 000 + 4 000 = 8 000 dollars",
    ],
    "5000": ["12 5000", r"\boxed{x = 5000} is 20\% more"],
    "1200": ["It is 3 x 400. The answer is $1,200.", "The answer is 3 x $400 = $1,200"],
    "1000000": ["答案：1,000,000 元", "答案：\n\n１，０００，０００ 元"],
}


@pytest.fixture
def data(tmp_path):
    rows = [
        {"question": question, "answer": f"Some <<3+4=7>>steps.\n#### {answer}"}
        for question, answer in QUESTIONS.items()
    ]
    return write_lines(tmp_path / "test.jsonl", rows)


def test_extraction():
    for expected, outputs in EXTRACTED.items():
        assert [gsm8k.extract(output) for output in outputs] == [expected] * len(outputs)


@pytest.mark.parametrize(
    ("mode", "begin", "end"), [("chat", "[Round 1]\n\n问：", "\n\n答："), ("base", "", "")]
)
def test_prompts_and_scores(tiny_tokenizer, data, tmp_path, mode, begin, end):
    """A prompt has eight examples, then the question; only a base model gets it as plain text."""

    def reply(text):
        return f"It is easy. The answer is {last_question(text, QUESTIONS)}.\n\nQ: What is 1 + 1?"

    oracle, options = FakeModel(tiny_tokenizer, reply), ("--mode", mode)
    right = evaluate(gsm8k, oracle, tiny_tokenizer, data, tmp_path / "1", *options)
    assert right["accuracy"] == 100 and right["num_items"] == 3
    prompts, settings = oracle.generate_calls[0]
    assert settings["stop_strings"] == ["Q:"] and settings["max_new_tokens"] == 512
    for prompt in prompts:
        assert prompt.count("The answer is ") == 8 and prompt.count("Q: ") == 9
        assert prompt.startswith(f"{begin}Q: There are 15 trees") and prompt.endswith(f"\nA:{end}")
    wrong = FakeModel(tiny_tokenizer, lambda text: "The answer is 7.")
    results = evaluate(gsm8k, wrong, tiny_tokenizer, data, tmp_path / "2", *options)
    assert results["accuracy"] == pytest.approx(100 / 3)
    assert (tmp_path / "2" / "results.md").read_text().endswith("| chatglm2-6b |    33.33 |\n")


def test_a_folder_or_a_file_or_the_hub(data, tmp_path, monkeypatch):
    rows = reading.read_json_lines(Path(data))
    configurations = {("openai/gsm8k", "main", "test"): rows}
    pretend_hub(monkeypatch, lambda name, config, split: configurations[name, config, split])
    items = load_items(gsm8k, data)
    assert items == load_items(gsm8k, tmp_path) == load_items(gsm8k, "openai/gsm8k")
    assert [item.answer for item in items] == ["7", "1200", "-2"]


def test_the_official_file(evaldata):
    items = load_items(gsm8k, evaldata / "gsm8k")
    assert len(items) == 1319
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", item.answer) for item in items)


@pytest.mark.parametrize(
    ("flag", "file", "text", "expected"),
    [
        ("--data", "none.jsonl", None, "none.jsonl: there is no such file .*https://github.com"),
        ("--data", "", None, "has no test.jsonl: .*https://github.com/openai"),
        ("--examples", "none.txt", None, "none.txt: there is no"),
        ("--examples", "gbk.txt", "问：1 加 1", r"gbk\.txt is damaged .*: it must be .*UTF-8"),
        ("--data", "x.jsonl", "[1, 2]", "item 1: there is no question, answer"),
        ("--data", "x.jsonl", '{"question": "?", "answer": "#### no"}', "after ####: ' no'"),
        ("--data", "x.jsonl", '{"question": "?", "answer": "2 of 3"}', "after ####: '2 of 3'"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, flag, file, text, expected):
    (tmp_path / "new").mkdir()
    path = tmp_path / "new" / file
    if text:
        path.write_bytes(text.encode("gbk"))
    assert re.search(expected, fail(gsm8k.main, ["--data", data, flag, str(path)]))


def test_examples_in_another_language(data, tmp_path):
    examples = tmp_path / "examples.txt"
    examples.write_text("问：1 加 1 等于几？\n答：答案是2。\n", "utf-8")
    for item in load_items(gsm8k, data, "--examples", str(examples)):
        assert item.prompt.startswith("问：1 加 1 等于几？\n答：答案是2。\n\nQ: ")
