"""For the tests of benchmarks: models without weights, which answer by a function of the prompt."""

import json
import sys
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from chatglm2 import ChatGLMConfig


class FakeModel(torch.nn.Module):
    """Answers each prompt with `reply(text)`, and gives `letter(text)` the highest logit.

    The prompts and settings of each call are kept in `generate_calls` and `forward_calls`.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, tokenizer, reply=lambda text: "", letter=lambda text: "C"):
        super().__init__()
        self.tokenizer, self.reply, self.letter = tokenizer, reply, letter
        self.config, self.generation_config = ChatGLMConfig(seq_length=32768), GenerationConfig()
        self.generate_calls, self.forward_calls = [], []

    def read(self, input_ids, attention_mask) -> list[str]:
        return [
            self.tokenizer.decode(ids[mask.bool()].tolist())
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]

    def generate(self, input_ids, attention_mask, position_ids, **settings):
        prompts = self.read(input_ids, attention_mask)
        self.generate_calls.append((prompts, settings))
        replies = [
            [*self.tokenizer.encode(self.reply(prompt), add_special_tokens=False), 2]
            for prompt in prompts
        ]
        width = max(map(len, replies))
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in replies])
        return torch.cat([input_ids, padded], dim=1)

    def forward(self, input_ids, attention_mask, position_ids, return_last_logit, return_dict):
        prompts = self.read(input_ids, attention_mask)
        self.forward_calls.append(prompts)
        logits = torch.zeros(len(prompts), 1, self.tokenizer.vocab_size)
        for row, prompt in zip(logits, prompts, strict=True):
            lead = "答案：" if prompt.endswith("答案：") else ""  # another token behind this
            row[0, self.tokenizer.encode(lead + self.letter(prompt))[-1]] = 1
        return type("Output", (), {"logits": logits})


def last_question(prompt: str, answers: dict[str, str]) -> str:
    """Return the answer to the question that stands last in a prompt."""
    return max((prompt.rfind(question), answer) for question, answer in answers.items())[1]


def evaluate(script, model, tokenizer, data, folder, *options) -> dict:
    """Run a benchmark with a model that is loaded already; return its results."""
    import core

    options = ["--data", str(data), "--output", str(folder), *options]
    args = core.parse_args(script.BENCHMARK, options)
    items = script.load_items(args)
    selected = core.select(items, args.subjects, args.limit)
    return core.run(script.BENCHMARK, selected, items, model, tokenizer, args)


def check_scores(script, tokenizer, data, folder, *options) -> dict:
    """Check the scores of a model that knows the answers, and of one that always takes C."""
    items = load_items(script, data)
    answers = {item.prompt: item.answer for item in items}
    oracle = FakeModel(tokenizer, letter=lambda text: last_question(text, answers))
    results = evaluate(script, oracle, tokenizer, data, folder / "oracle", *options)
    assert results["accuracy"] == 100 and set(results["categories"].values()) == {100}
    always_c = FakeModel(tokenizer)
    accuracy = evaluate(script, always_c, tokenizer, data, folder / "c", *options)["accuracy"]
    assert 0 < accuracy < 100
    assert accuracy == pytest.approx(100 * mean(item.answer == "C" for item in items))
    return results


def load_items(script, data, *options) -> list:
    import core

    return script.load_items(core.parse_args(script.BENCHMARK, ["--data", str(data), *options]))


def write_lines(path, rows) -> str:
    """Write a file of JSON lines; return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def read_records(folder) -> dict[str, dict]:
    """Return the records of `items.jsonl` by key."""
    lines = (folder / "items.jsonl").read_text("utf-8").splitlines()[1:]
    return {record["key"]: record for record in map(json.loads, lines)}


def pretend_hub(monkeypatch, load_dataset):
    """Replace the package `datasets`."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
