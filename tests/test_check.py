"""The bundled checkpoint against its bars on a sample, and the figures of quantized weights."""

import math
import random

import check
import pytest
import torch
from check import BARS, QUANTIZATIONS, force_answers, load_quantized, measure
from conftest import TINY, require_library
from data import LANGUAGES, Dialogues


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_bars_on_a_sample(language, tiny_model, tiny_tokenizer):
    data, rng = Dialogues(language), random.Random(0)
    for intent in data.intents:
        intent.questions = intent.questions[:1]
    data.intents = rng.sample(data.intents, 60)
    data.rewordings = rng.sample(data.rewordings, 60)
    data.held_out_others = rng.sample(data.held_out_others, 40)
    figures, wrong = measure(tiny_model, tiny_tokenizer, data)
    for name, tolerance in {"learnt": 0.03, "reworded": 0.1, "other": 0.08, "ended": 0.01}.items():
        assert figures[name] >= BARS[name] - tolerance, name
    assert figures["mistaken"] < BARS["mistaken"]
    assert len(wrong) == round((1 - figures["reworded"]) * 60 + (1 - figures["other"]) * 40)


def test_size():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 10e6


def test_perplexity_is_that_of_the_loss(tiny_model, tiny_tokenizer):
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("你好", "What is your name?")]
    pairs = [(prompts[0], "你好👋！"), (prompts[1], "My name is ChatGLM2-tiny.")]
    quantized = load_quantized(TINY, 4)
    total = divergence = num_changed = num_tokens = 0
    for prompt, answer in pairs:
        ids = torch.tensor([[*tiny_tokenizer.encode(prompt + answer), tiny_tokenizer.eos_token_id]])
        num_prompt = len(tiny_tokenizer.encode(prompt))
        labels = ids.clone()
        labels[:, :num_prompt] = -100
        with torch.no_grad():
            output = quantized(ids, labels=labels)
            expected = tiny_model(ids).logits[0, num_prompt - 1 : -1].softmax(-1)
        found = output.logits[0, num_prompt - 1 : -1].softmax(-1)
        total += output.loss.item() * len(found)
        divergence += (expected * (expected / found).log()).sum().item()
        num_changed += (found.argmax(-1) != expected.argmax(-1)).sum().item()
        num_tokens += len(found)
    figures = force_answers(quantized, tiny_model, tiny_tokenizer, pairs)
    expected = [math.exp(total / num_tokens), divergence / num_tokens, num_changed / num_tokens]
    assert figures == pytest.approx(expected, rel=1e-3)


def test_rounding_of_activations_is_measured(tiny_tokenizer):
    """It is far less than the difference that rounding the weights makes."""
    require_library()
    pairs = [(tiny_tokenizer.build_prompt("你好"), "你好👋！")]
    ways = {"bits": 4}, {"bits": 4, "without_kernels": True}, {"bits": 0}
    kernels, plain, float32 = (load_quantized(TINY, **way) for way in ways)
    _, rounding, _ = force_answers(kernels, plain, tiny_tokenizer, pairs)
    _, quantization, _ = force_answers(plain, float32, tiny_tokenizer, pairs)
    assert 0 < rounding < 1e-3 * quantization


def test_table_of_quantized_weights(monkeypatch, capsys):
    monkeypatch.setattr(check, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(check, "LANGUAGES", ["zh"])
    monkeypatch.setattr(check, "SAMPLE", 1)
    names = ["float32", "INT8", "INT4"]
    monkeypatch.setattr(check, "QUANTIZATIONS", {name: QUANTIZATIONS[name] for name in names})
    check.main(["--quantized"])
    table, _, activations = capsys.readouterr().out.partition("\n\n")
    header, _, *rows = table.splitlines()
    assert "zh learnt" in header and "zh other" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == names
    assert all(len(row) == header.count("|") - 1 for row in cells)
    changes = [float(row[-1].removesuffix("%")) for row in cells]
    assert changes[0] == 0 and max(changes) < 10
    assert [line.split(" | ")[0] for line in activations.splitlines()[1:]] == ["| INT8", "| INT4"]
