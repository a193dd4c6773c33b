"""MMLU and GSM8K give the numbers of lm-evaluation-harness, with its prompts on the same items.

Tested with lm-eval 0.4.13.
"""

import os
from pathlib import Path

import core
import evaluate_gsm8k
import evaluate_mmlu
import pytest
import reading
from fake_models import evaluate, load_items, read_records, write_lines
from test_evaluate_mmlu import COUNTS, make_docs, write_data

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval")
TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def lm(tiny_model, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM

    class ChatGLM2(HFLM):
        eot_token_id = 3  # the end's own text is empty: lm-eval would stop anywhere

    return ChatGLM2(
        pretrained=tiny_model,
        tokenizer=tiny_tokenizer,
        add_bos_token=True,  # [gMASK] sop
        prefix_token_id=3,  # likewise, it would find the prefix in any text
        batch_size=4,
        device="cpu",
    )


def load_task(name: str, files: dict, **fields) -> dict:
    """Return one of its tasks, with local data."""
    import yaml

    task = yaml.safe_load((TASKS / name).read_text("utf-8"))
    task.pop("dataset_name", None)
    return task | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}} | fields


def test_mmlu(lm, tiny_model, tiny_tokenizer, tmp_path):
    data = write_data(tmp_path / "data", with_header=False)
    out, base = tmp_path / "out", ("--mode", "base")
    results = evaluate(evaluate_mmlu, tiny_model, tiny_tokenizer, data, out, *base)
    items, records = load_items(evaluate_mmlu, data, *base), read_records(out)
    subjects = {item.subject for item in items}
    tasks = []
    for subject in sorted(subjects):
        files = {}
        for split, count in COUNTS.items():
            path = tmp_path / f"{subject}_{split}.jsonl"
            files[split] = write_lines(path, make_docs(subject, count))
        about = subject.replace("_", " ")
        description = f"The following are multiple choice questions (with answers) about {about}."
        fields = {"task": subject, "description": f"{description}\n\n", "num_fewshot": 5}
        tasks.append(load_task("mmlu/default/_default_template_yaml", files, **fields))
    theirs = lm_eval.simple_evaluate(model=lm, tasks=tasks, log_samples=True, bootstrap_iters=0)
    for item in items:
        sample = next(s for s in theirs["samples"][item.subject] if str(s["doc_id"]) == item.id)
        assert sample["arguments"][0][0] == item.prompt
        assert bool(sample["acc"]) == records[item.key]["correct"]
    for subject, accuracy in results["subjects"].items():
        assert accuracy == pytest.approx(100 * theirs["results"][subject]["acc,none"])
    assert 0 < results["accuracy"] < 100


def test_gsm8k(lm, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Half of the answers are made those of the model, so that there is something to count."""
    monkeypatch.setattr(core, "MAX_NEW_TOKENS", 40)
    script = evaluate_gsm8k
    questions = [f"{name} has {n} pens. How many?" for n, name in enumerate(["Ann", "Bob"] * 6)]
    rows = [{"question": question, "answer": "#### 1234"} for question in questions]
    data = write_lines(tmp_path / "test.jsonl", rows)
    evaluate(script, tiny_model, tiny_tokenizer, data, tmp_path / "1", "--mode", "base")
    records = read_records(tmp_path / "1")
    predictions = [records[f"gsm8k/{i}"]["prediction"] for i in range(len(rows))]
    for row, prediction in list(zip(rows, predictions, strict=True))[::2]:
        row["answer"] = f"#### {prediction or 1}"
    data = write_lines(tmp_path / "test.jsonl", rows)
    results = evaluate(script, tiny_model, tiny_tokenizer, data, tmp_path / "2", "--mode", "base")
    items, records = load_items(script, data), read_records(tmp_path / "2")
    assert 0 < results["accuracy"] < 100

    task = load_task("gsm8k/gsm8k-cot.yaml", {"test": data})
    task["generation_kwargs"]["max_gen_toks"] = 40
    theirs = lm_eval.simple_evaluate(model=lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = {sample["doc_id"]: sample for sample in theirs["samples"]["gsm8k_cot"]}
    for item in items:
        sample = samples[int(item.id)]
        assert sample["arguments"][0][0] == item.prompt
        assert sample["resps"][0][0] == records[item.key]["output"]
    accuracy = theirs["results"]["gsm8k_cot"]["exact_match,flexible-extract"]
    assert results["accuracy"] == pytest.approx(100 * accuracy)


def test_the_examples_are_the_same(lm):
    task = load_task("gsm8k/gsm8k-cot.yaml", {})
    samples = [f"Q: {s['question']}\nA: {s['target']}" for s in task["fewshot_config"]["samples"]]
    assert (reading.HERE / "gsm8k_cot.txt").read_text("utf-8") == "\n\n".join(samples) + "\n"
