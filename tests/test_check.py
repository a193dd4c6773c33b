"""The bundled checkpoint against its bars on a sample, and the figures of quantized weights."""

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
    total, num_tokens, likeliest = 0, 0, []
    for prompt, answer in pairs:
        ids = torch.tensor([[*tiny_tokenizer.encode(prompt + answer), tiny_tokenizer.eos_token_id]])
        num_prompt = len(tiny_tokenizer.encode(prompt))
        labels = ids.clone()
        labels[:, :num_prompt] = -100
        with torch.no_grad():
            output = tiny_model(ids, labels=labels)
        total += output.loss.item() * (ids.shape[1] - num_prompt)
        num_tokens += ids.shape[1] - num_prompt
        likeliest += output.logits[0, num_prompt - 1 : -1].argmax(-1).tolist()
    perplexity, found = force_answers(tiny_model, tiny_tokenizer, pairs)
    assert perplexity == pytest.approx(torch.tensor(total / num_tokens).exp().item(), rel=1e-4)
    assert found.tolist() == likeliest


def test_rounded_prompts_are_measured(tiny_tokenizer):
    require_library()
    pairs = [(tiny_tokenizer.build_prompt("你好"), "你好👋！")]
    exact, rounded = (
        force_answers(load_quantized(TINY, **QUANTIZATIONS[name]), tiny_tokenizer, pairs)[0]
        for name in ("INT4", "INT4, prompts rounded")
    )
    assert exact != rounded == pytest.approx(exact, rel=0.1)


def test_table_of_quantized_weights(monkeypatch, capsys):
    monkeypatch.setattr(check, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(check, "LANGUAGES", ["zh"])
    monkeypatch.setattr(check, "SAMPLE", 1)
    names = ["float32", "INT4", "INT4, prompts rounded"]
    monkeypatch.setattr(check, "QUANTIZATIONS", {name: QUANTIZATIONS[name] for name in names})
    check.main(["--quantized"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "zh learnt" in header and "zh other" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == names
    assert all(len(row) == header.count("|") - 1 for row in cells)
    agreements = [float(row[-1].removesuffix("%")) for row in cells]
    assert agreements[0] == 100 and min(agreements) > 90
