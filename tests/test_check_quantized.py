"""`check_quantized.py`: its perplexity and agreement, and its table from a few questions."""

import check
import check_quantized
import pytest
import torch
from check_quantized import WAYS, force_answers, load

from chatglm2 import quantization
from chatglm2.kernels import Backend
from chatglm2.quantization import torch_matmul


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


def test_rounded_prompts_are_measured(tiny_checkpoint, tiny_tokenizer, monkeypatch):
    class Rounding(Backend):
        def matmul(self, x, layer):
            return torch_matmul(x, layer)

        def prompt_matmul(self, x, layer):
            return 1.1 * torch_matmul(x, layer)

    monkeypatch.setattr(quantization, "pick_backend", lambda *_: Rounding())
    pairs = [(tiny_tokenizer.build_prompt("你好"), "你好👋！")]
    exact, rounded = (
        force_answers(load(tiny_checkpoint, **WAYS[name]), tiny_tokenizer, pairs)[0]
        for name in ("INT4", "INT4, prompts rounded")
    )
    plain = load(tiny_checkpoint, 4, exact_prefill=False)
    monkeypatch.setattr(plain.base_model, "backend", None)
    assert exact == pytest.approx(force_answers(plain, tiny_tokenizer, pairs)[0], rel=1e-6)
    assert rounded != pytest.approx(exact, rel=1e-4)


def test_table(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(check, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr(check_quantized, "LANGUAGES", ["zh"])
    names = "float32", "INT4", "INT4, prompts rounded"
    ways = {name: check_quantized.WAYS[name] for name in names}
    monkeypatch.setattr(check_quantized, "WAYS", ways)
    check_quantized.main(["--model", str(tiny_checkpoint), "--sample", "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "zh learnt" in header and "zh other" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == list(ways)
    assert all(len(row) == header.count("|") - 1 for row in cells)
    agreements = [float(row[-1].removesuffix("%")) for row in cells]
    assert agreements[0] == 100 and min(agreements) > 90
