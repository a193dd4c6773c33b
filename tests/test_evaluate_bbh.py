"""evaluate_bbh.py: extraction from hard outputs, prompts, the repository's layout."""

import json
import shutil

import evaluate_bbh as bbh
import pytest
from fake_models import FakeModel, evaluate, last_question, load_items

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


@pytest.mark.parametrize(
    ("output", "has_options", "expected"),
    [
        ("(A) is wrong, so is (C). So the answer is (B).", True, "(b)"),
        ("So the answer is B.", True, "(b)"),
        ("The answer is **(D)** 03/04/1987.", True, "(d)"),
        ("所以答案是B。", True, "(b)"),
        ("答案：(C) 红色", True, "(c)"),
        ("the answer is option F", True, "(f)"),
        ("So the answer is A big red car", True, "(a)"),
        ("So the answer is Monsters, Inc.", True, "monsters, inc"),
        ("I like (A) and (B).", True, ""),
        ("Let us see which answer is right. (A) is not. So the answer is (B).", True, "(b)"),
        ("Let us see which answer is right. (A) is not.", True, ""),
        ("The correct answer is not A. The answer is (B)", True, "(b)"),
        ("The answer is not (A) but (B).", True, "(b)"),
        ("The answer is (b) red", True, "(b)"),
        ("The answer is B, since (A) is wrong.", True, "(b)"),
        ("The answer is a red ball, (D).", True, "(d)"),
        ("The answer is I think (C).", True, "(c)"),
        ("The answer is what I said.", True, "what i said"),
        ("The answer is I.", True, "(i)"),
        ("The final answer is:\n**(E)**", True, "(e)"),
        ("答案是（B）。", True, "(b)"),
        ("So the answer is Yes!", False, "yes"),
        ("So the answer is no? Yes", False, "no"),
        ("So the answer is No, because he left.", False, "no"),
        ("答案：valid，因为如此。", False, "valid"),
        ("So the answer is apple, pear.", False, "apple, pear"),
        ("So the answer is No.", False, "no"),
        ("So the answer is Yes. That is because ...", False, "yes"),
        ("So the answer is **True**.", False, "true"),
        ('So the answer is "valid."', False, "valid"),
        ("So the answer is ] } ].\nMore", False, "] } ]"),
        ("So the answer is -219.", False, "-219"),
        ("So the answer is barn  damp drumhead.", False, "barn damp drumhead"),
        ("The answer is 5. So the answer is 6.", False, "6"),
        ("I do not know.", False, ""),
        ("", False, ""),
    ],
)
def test_extraction(output, has_options, expected):
    assert bbh.extract(output, has_options) == expected


@pytest.mark.parametrize("mode", ["chat", "base"])
def test_oracle_and_a_wrong_model(tiny_tokenizer, data, tmp_path, mode):
    """The accuracy is the mean of the tasks'."""

    def reply(text):
        return (
            f"Well. So the answer is {last_question(text, QUESTIONS)}.\n\nQ: Next. The answer is 1."
        )

    options = ("--mode", mode)
    oracle = FakeModel(tiny_tokenizer, reply)
    assert evaluate(bbh, oracle, tiny_tokenizer, data, tmp_path / "1", *options)["accuracy"] == 100
    wrong = FakeModel(tiny_tokenizer, lambda text: "So the answer is (A).")
    results = evaluate(bbh, wrong, tiny_tokenizer, data, tmp_path / "2", *options)
    assert results["subjects"] == {"navigate": 0, "hyperbaton": 50, "dyck_languages": 0}
    assert results["accuracy"] == pytest.approx(50 / 3)


def test_prompts(tiny_tokenizer, data, tmp_path):
    seen = {}
    for mode in ("chat", "base"):
        model = FakeModel(tiny_tokenizer)
        evaluate(bbh, model, tiny_tokenizer, data, tmp_path / mode, "--mode", mode)
        (seen[mode], settings) = model.generate_calls[0]
        assert settings["stop_strings"] == ["\n\nQ:"] and settings["max_new_tokens"] == 512
    assert [f"[Round 1]\n\n问：{prompt}\n\n答：" for prompt in seen["base"]] == seen["chat"]
    assert (
        "Do navigate.\n\nQ: First.\nA: Let's think step by step.\n"
        "Thinking. So the answer is No.\n\n"
        "Q: Do you return? Turn left.\nA: Let's think step by step."
    ) in seen["base"]


def test_the_official_repository(evaldata):
    items = load_items(bbh, evaldata / "bbh")
    assert len(items) == 6511 and len({item.subject for item in items}) == 27
    assert not any("canary" in item.prompt for item in items)
    for item in items:
        target = item.answer.upper() if item.answer.startswith("(") else item.answer
        output = f"Not (B), 3, or yes. So the answer is {target}."
        assert bbh.extract_prediction(output, item) == item.answer, item.key


def test_the_official_examples(evaldata):
    """Their own sentences name a target of the task, and each option that its question has."""
    targets, count = {}, 0
    for item in load_items(bbh, evaldata / "bbh"):
        targets.setdefault(item.subject, set()).add(item.answer)
    for path in (evaldata / "bbh").glob("cot-prompts/*.txt"):
        for example in path.read_text("utf-8").split("\nQ: ")[1:]:
            question, _, output = example.partition("\nA: ")
            answer = bbh.extract(output, "\n(A) " in question)
            assert output.rstrip().lower().endswith(f"answer is {answer}."), (path, output)
            few_targets = len(targets[path.stem]) < 20
            assert answer in targets[path.stem] or not few_targets, (path, answer)
            count += 1
    assert count == 3 * len(targets) == 81


@pytest.mark.parametrize("missing", ["", "bbh", "cot-prompts"])
def test_missing_data_is_one_line(data, missing):
    shutil.rmtree(data / missing)
    source = r"https://github\.com/suzgunmirac/BIG-Bench-Hard"
    with pytest.raises(SystemExit, match=source) as error:
        bbh.main(["--data", str(data)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[]", '{"examples": 1}', '{"examples": [1]}', '{"examples": [{}]}', '{"examples": [']
)
def test_foreign_data_is_one_line(data, text):
    (data / "bbh" / "navigate.json").write_text(text)
    with pytest.raises(SystemExit, match=r"navigate\.json(, item 1: there| is damaged)"):
        bbh.main(["--data", str(data)])
