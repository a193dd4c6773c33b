"""evaluate_bbh.py: extraction from hard outputs, prompts, the repository's layout."""

import json
import re
import shutil

import evaluate_bbh as bbh
import pytest
from fake_models import FakeModel, evaluate, last_question, load_items
from loading import fail

TASKS = {
    "navigate": {"Do you return? Turn left.": "No", "Do you return? Turn around.": "Yes"},
    "hyperbaton": {
        "Which order is right?\nOptions:\n(A) big red\n(B) red big": "(A)",
        "Which order is right here?\nOptions:\n(A) old new\n(B) new old": "(B)",
    },
    "dyck_languages": {"Complete the sequence. Input: [ {": "} ]"},
}
QUESTIONS = {question: answer for task in TASKS.values() for question, answer in task.items()}
EXAMPLES = """\
A warning that is not part of the prompt.
-----
Do {task}.

Q: First.
A: Let's think step by step.
Thinking. So the answer is {answer}."""
OPTIONS = {
    "": ["I like (A) and (B).", "Let us see which answer is right. (A) is not."],
    "(a)": ["So the answer is A big red car"],
    "(b)": [
        "(A) is wrong, so is (C). So the answer is (B).",
        "Let us see which answer is right. (A) is not. So the answer is B.",
        "The correct answer is not A. The answer is (B)",
        "The answer is not (A) but (B).",
        "The answer is (b) red",
        "The answer is B, since (A) is wrong.",
        "所以答案是B。",
        "答案是（B）。",
        "答案：(B) 红色",
    ],
    "(c)": ["The answer is I think (C)."],
    "(d)": ["The answer is **(D)** 03/04/1987.", "The answer is a red ball, (D)."],
    "(e)": ["The final answer is:\n**(E)**"],
    "(f)": ["the answer is option F"],
    "(i)": ["The answer is I."],
    "monsters, inc": ["So the answer is Monsters, Inc."],
    "what i said": ["The answer is what I said."],
}
TEXTS = {
    "": ["I do not know.", ""],
    "-219": ["The answer is 5. So the answer is -219."],
    "] } ]": ["So the answer is ] } ].\nMore"],
    "apple, pear": ["So the answer is apple, pear."],
    "barn damp drumhead": ["So the answer is barn  damp drumhead."],
    "no": ["So the answer is no? Yes", "The answer is No, because he left.", "The answer is No."],
    "true": ["So the answer is **True**."],
    "valid": ["答案：valid，因为如此。", 'So the answer is "valid."'],
    "yes": ["So the answer is Yes!", "So the answer is Yes. That is because ..."],
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "BBH"
    (folder / "bbh").mkdir(parents=True)
    (folder / "cot-prompts").mkdir()
    for task, questions in TASKS.items():
        rows = [{"input": question, "target": answer} for question, answer in questions.items()]
        text = json.dumps({"canary": "x", "examples": rows})
        (folder / "bbh" / f"{task}.json").write_text(text, "utf-8")
        prompt = EXAMPLES.format(task=task, answer=rows[0]["target"])
        (folder / "cot-prompts" / f"{task}.txt").write_text(prompt, "utf-8")
    return folder


@pytest.mark.parametrize(("has_options", "extracted"), [(True, OPTIONS), (False, TEXTS)])
def test_extraction(has_options, extracted):
    for expected, outputs in extracted.items():
        assert [bbh.extract(x, has_options) for x in outputs] == [expected] * len(outputs)


@pytest.mark.parametrize(
    ("mode", "begin", "end"), [("chat", "[Round 1]\n\n问：", "\n\n答："), ("base", "", "")]
)
def test_prompts_and_scores(tiny_tokenizer, data, tmp_path, mode, begin, end):
    """The accuracy is the mean of the tasks'."""

    def reply(text):
        return f"So the answer is {last_question(text, QUESTIONS)}.\n\nQ: Next. The answer is 1."

    oracle, options = FakeModel(tiny_tokenizer, reply), ("--mode", mode)
    assert evaluate(bbh, oracle, tiny_tokenizer, data, tmp_path / "1", *options)["accuracy"] == 100
    prompts, settings = oracle.generate_calls[0]
    assert settings["stop_strings"] == ["\n\nQ:"] and settings["max_new_tokens"] == 512
    assert (
        f"{begin}Do navigate.\n\nQ: First.\nA: Let's think step by step.\n"
        "Thinking. So the answer is No.\n\n"
        f"Q: Do you return? Turn left.\nA: Let's think step by step.{end}"
    ) in prompts
    wrong = FakeModel(tiny_tokenizer, lambda text: "So the answer is (A).")
    results = evaluate(bbh, wrong, tiny_tokenizer, data, tmp_path / "2", *options)
    assert results["subjects"] == {"navigate": 0, "hyperbaton": 50, "dyck_languages": 0}
    assert results["accuracy"] == pytest.approx(50 / 3)


def test_the_official_repository(evaldata):
    items = load_items(bbh, evaldata / "bbh")
    assert len(items) == 6511 and len({item.subject for item in items}) == 27
    assert not any("canary" in item.prompt for item in items)
    for item in items:
        target = item.answer.upper() if item.answer.startswith("(") else item.answer
        output = f"Not (B), 3, or yes. So the answer is {target}."
        assert bbh.extract_prediction(output, item) == item.answer, item.key


def test_the_official_examples(evaldata):
    """Their own sentences name the answer."""
    examples = [
        example.partition("\nA: ")[::2]
        for path in (evaldata / "bbh").glob("cot-prompts/*.txt")
        for example in path.read_text("utf-8").split("\nQ: ")[1:]
    ]
    assert len(examples) == 81
    for question, output in examples:
        answer = bbh.extract(output, "\n(A) " in question)
        assert output.rstrip().lower().endswith(f"answer is {answer}.")


@pytest.mark.parametrize("missing", ["", "bbh", "cot-prompts"])
def test_missing_data_is_one_line(data, missing):
    shutil.rmtree(data / missing)
    assert "https://github.com/suzgunmirac/BIG-Bench-Hard" in fail(bbh.main, ["--data", str(data)])


@pytest.mark.parametrize(
    "text", ["[]", '{"examples": 1}', '{"examples": [1]}', '{"examples": [{}]}', '{"examples": [']
)
def test_foreign_data_is_one_line(data, text):
    (data / "bbh" / "navigate.json").write_text(text)
    message = fail(bbh.main, ["--data", str(data)])
    assert re.search(r"navigate\.json(, item 1: there| is damaged)", message)
