"""MMLU and GSM8K give the numbers of lm-evaluation-harness, with its prompts on the same items.

It also finds the same log-probabilities through `openai_api.py` as with the model itself.

Tested with lm-eval 0.4.13.
"""

import os
from pathlib import Path

import core
import evaluate_gsm8k
import evaluate_mmlu
import pytest
import reading
from conftest import TINY
from fake_models import evaluate, load_items, read_records, write_lines
from servers import serve
from test_evaluate_mmlu import COUNTS, make_docs, write_data

import openai_api

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


def make_tasks(tmp_path, model, tokenizer) -> list[dict]:
    """Return tasks of MMLU, C-Eval, whole answers of the model, and running texts."""
    common = {"dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    common |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "num_fewshot": 0}

    def write(name: str, rows: list[dict]) -> dict:
        return {"data_files": {"test": write_lines(tmp_path / f"{name}.jsonl", rows)}}

    questions = ["你好", "讲个笑话", "今天工作好累啊", "What is your name?", "tell me a joke"]
    answers = [model.chat(tokenizer, question, do_sample=False)[0] for question in questions]
    chats = [
        {"prompt": tokenizer.build_prompt(question), "answers": answers, "target": i}
        for i, question in enumerate(questions)
    ]
    fields = {"doc_to_text": "{{prompt}}", "doc_to_choice": "{{answers}}", "target_delimiter": ""}
    chat = {"task": "chat", "dataset_kwargs": write("chat", chats), "doc_to_target": "target"}
    letters = "ABCD"
    exams = [
        {"question": f"第{i}题：{q}的“龘”是？🤖", "answer": letters[i % 4]}
        | dict(zip(letters, [a[k : k + 9] for k in (0, 3, 6, 9)], strict=True))
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    split = {"validation_split": None, "test_split": "test", "fewshot_split": "test"}
    name = "ceval/_default_ceval_yaml"
    ceval = load_task(name, write("ceval", exams)["data_files"], task="ceval", num_fewshot=2)
    docs = make_docs("anatomy", 8)
    name = "mmlu/default/_default_template_yaml"
    mmlu = load_task(name, write("mmlu", docs)["data_files"], task="mmlu", num_fewshot=5)
    # Within the context: lm-eval divides a longer text otherwise for a server.
    pages = [{"page": "\n".join(answers[i:]) * 4} for i in range(3)]
    metrics = [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]
    texts = {"task": "texts", "output_type": "loglikelihood_rolling", "metric_list": metrics}
    texts |= {"doc_to_text": "", "doc_to_target": "{{page}}"}
    return [
        common | chat | fields,
        ceval | split | {"doc_to_choice": "{{[A, B, C, D]}}"},
        mmlu | split,
        common | texts | {"dataset_kwargs": write("texts", pages)},
    ]


@pytest.mark.slow
def test_the_server_gives_the_numbers_of_the_model(lm, tiny_model, tiny_tokenizer, tmp_path):
    tasks = make_tasks(tmp_path, tiny_model, tiny_tokenizer)
    settings = {"tasks": tasks, "log_samples": True, "bootstrap_iters": 0}
    with serve(openai_api.create_app, tiny_model, tiny_tokenizer) as client:
        model_args = {
            "model": "chatglm2-tiny",
            "base_url": f"{client.base_url}/v1/completions".replace("//v1", "/v1"),
            "tokenizer": str(TINY),
            "tokenizer_backend": "huggingface",
            "add_bos_token": True,
            "custom_prefix_token_id": 3,
            "batch_size": 5,
            "max_length": lm.max_length,
        }
        served = lm_eval.simple_evaluate(
            model="local-completions", model_args=model_args, **settings
        )
    direct = lm_eval.simple_evaluate(model=lm, **settings)
    num_compared, num_greedy = 0, 0
    for name, samples in direct["samples"].items():
        for mine, theirs in zip(served["samples"][name], samples, strict=True):
            assert mine["arguments"] == theirs["arguments"]
            if name == "texts":
                assert mine["resps"][0] == pytest.approx(theirs["resps"][0], rel=1e-5)
                continue
            for (found, is_greedy), (expected, was_greedy) in zip(
                mine["filtered_resps"], theirs["filtered_resps"], strict=True
            ):
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
                assert is_greedy == was_greedy
                num_compared, num_greedy = num_compared + 1, num_greedy + is_greedy
        assert served["results"][name] == pytest.approx(direct["results"][name]), name
    assert num_compared > 40 and 3 < num_greedy < num_compared
    assert direct["results"]["chat"]["acc,none"] > 0.5
