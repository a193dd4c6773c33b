"""evaluate_gsm8k.py: extraction from hard outputs, prompts, data."""

import json
import re

import evaluate_gsm8k as gsm8k
import pytest
from fake_models import FakeModel, evaluate, last_question, load_items, pretend_hub

QUESTIONS = {
    "Ann has 3 pens and buys 4. How many has she?": "7",
    "A car costs $1,150 and a bike 50. What do both cost?": "1,200",
    "It is 3 degrees, then 5 less. What is it?": "-2",
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        {"question": question, "answer": f"Some <<3+4=7>>steps.\n#### {answer}"}
        for question, answer in QUESTIONS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("5 + 6 = 11. The answer is 11.", "11"),
        ("She pays 3 x 400 = 1,200 dollars. The answer is $1,200.", "1200"),
        ("The answer is 18.00 dollars.", "18"),
        ("The answer is -7.", "-7"),
        ("The answer is 20%. That is 5 of 25.", "20"),
        ("the answer is: **42** apples", "42"),
        ("所以他一共有 3 + 4 = 7 个苹果。答案是7个。", "7"),
        ("答案：1,000,000 元", "1000000"),
        ("答案为 １２ 元", "12"),
        ("The answer is 5. The answer is 9.", "5"),
        ("The answer is 5 + 6 = 11.", "11"),
        ("The answer is 3 x $400 = $1,200", "1200"),
        ("The answer is 10-3=7", "7"),
        ("The answer is 2 x 3 = 6 and 6 + 1 = 7. Check: 7 = 8 - 1", "7"),
        ("The answer is 5 (= all).", "5"),
        ("The answer is approx. 18 of 20", "18"),
        ("The answer is...18", "18"),
        ("The answer is:\n\n**18**", "18"),
        ("答案：\n\n１，２００ 元", "1200"),
        ("The answer is $.50", "0.5"),
        ("The answer is .5", "0.5"),
        ("The answer is \u22127.", "-7"),
        ("The answer is －７。", "-7"),
        ("The garden has 5 m².", "5"),
        ("The answer is clear.\nIt is 12 kilometres, 3 more than 9", "9"),
        ("So 21-15=6", "6"),
        ("She has 8 boxes of 6, that is 48 eggs.", "48"),
        ("It costs 0.5 dollars", "0.5"),
        ("In the list 3,4,5", "5"),
        ("I do not know.", ""),
        ("", ""),
        ("The answer is", ""),
    ],
)
def test_extraction(output, expected):
    assert gsm8k.extract(output) == expected


@pytest.mark.parametrize("mode", ["chat", "base"])
def test_oracle_and_a_wrong_model(tiny_tokenizer, data, tmp_path, mode):
    def reply(text):
        return f"It is easy. The answer is {last_question(text, QUESTIONS)}.\n\nQ: What is 1 + 1?"

    oracle = FakeModel(tiny_tokenizer, reply)
    options = ("--mode", mode)
    right = evaluate(gsm8k, oracle, tiny_tokenizer, data, tmp_path / "1", *options)
    assert right["accuracy"] == 100 and right["num_items"] == 3
    wrong = FakeModel(tiny_tokenizer, lambda text: "The answer is 7.")
    results = evaluate(gsm8k, wrong, tiny_tokenizer, data, tmp_path / "2", *options)
    assert results["accuracy"] == pytest.approx(100 / 3)
    assert (tmp_path / "2" / "results.md").read_text() == (
        "| Model       | Accuracy |\n| ----------- | -------- |\n| chatglm2-6b |    33.33 |\n"
    )


def test_prompts(tiny_tokenizer, data, tmp_path):
    """Eight examples, then the question; in the chat format unless the model is a base model."""
    seen = {}
    for mode in ("chat", "base"):
        model = FakeModel(tiny_tokenizer)
        evaluate(gsm8k, model, tiny_tokenizer, data, tmp_path / mode, "--mode", mode)
        (seen[mode], settings) = model.generate_calls[0]
        assert settings["stop_strings"] == ["Q:"] and settings["max_new_tokens"] == 512
    for chat, base in zip(seen["chat"], seen["base"], strict=True):
        assert chat == f"[Round 1]\n\n问：{base}\n\n答："
        assert base.count("The answer is ") == 8 and base.count("Q: ") == 9
        assert base.endswith("\nA:") and base.startswith("Q: There are 15 trees")


def test_examples_in_another_language(tiny_tokenizer, data, tmp_path):
    examples = tmp_path / "examples.txt"
    examples.write_text("问：1 加 1 等于几？\n答：答案是2。\n", "utf-8")
    model = FakeModel(tiny_tokenizer)
    evaluate(gsm8k, model, tiny_tokenizer, data, tmp_path, "--examples", str(examples))
    prompts, _ = model.generate_calls[0]
    assert all("问：1 加 1 等于几？\n答：答案是2。\n\nQ: " in prompt for prompt in prompts)


def test_a_folder_or_a_file_or_the_hub(data, monkeypatch):
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]

    def load_dataset(name, config, split):
        assert (name, config, split) == ("openai/gsm8k", "main", "test")
        return rows

    pretend_hub(monkeypatch, load_dataset)
    items = load_items(gsm8k, data)
    assert items == load_items(gsm8k, data.parent) == load_items(gsm8k, "openai/gsm8k")
    assert [item.answer for item in items] == ["7", "1200", "-2"]


def test_an_item_without_a_number_is_named(data):
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "?", "answer": "I do not know"}) + "\n")
    with pytest.raises(SystemExit, match="item 4: there is no number after ####"):
        gsm8k.main(["--data", str(data)])


def test_the_official_file(evaldata):
    items = load_items(gsm8k, evaldata / "gsm8k")
    assert len(items) == 1319
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", item.answer) for item in items)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere"], "nowhere: there is no such file .*https://github.com/openai"),
        (["--data", "{tmp}"], "has no test.jsonl: .*https://github.com/openai"),
        (["--examples", "none.txt"], "--examples none.txt: there is no"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, expected):
    with pytest.raises(SystemExit, match=expected):
        gsm8k.main([option.format(tmp=tmp_path) for option in options])


def test_lines_that_are_no_objects_and_other_encodings(data, tmp_path):
    examples = tmp_path / "examples.txt"
    examples.write_bytes("问：1 加 1".encode("gbk"))
    with pytest.raises(SystemExit, match=r"examples\.txt is damaged .*: it must be .*UTF-8"):
        gsm8k.main(["--data", str(data), "--examples", str(examples)])
    data.write_text("[1, 2]\n")
    with pytest.raises(SystemExit, match=r"item 1: there is no question, answer"):
        gsm8k.main(["--data", str(data)])
