"""Measure what INT8 and INT4 cost the bundled checkpoint: the table of docs/quantization.md.

    python resources/chatglm2-tiny/training/check_quantized.py [--model FOLDER] [--sample 340]

Per language, greedily, in float32 on a CPU: right answers to a sample of each of `check.py`'s
sets. Then, with the right answers given token by token: their perplexity, and the share of tokens
at which the likeliest one is that of the unquantized model. Where prompts are rounded, their
activations are int8 (by the C kernels only), in the second part those of the answers too, which is
more than a user gets. Exits with 1 if INT4 loses more than `MAX_LOSS` on a set.
"""

import argparse
import random
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from check import BATCH_SIZE, ROOT, answer, question_sets
from data import LANGUAGES, Dialogues

from chatglm2 import ChatGLMForConditionalGeneration, ChatGLMTokenizer

WAYS = {
    "float32": {"bits": 0},
    "INT8": {"bits": 8},
    "INT8, prompts rounded": {"bits": 8, "exact_prefill": False},
    "INT4": {"bits": 4},
    "INT4, prompts rounded": {"bits": 4, "exact_prefill": False},
    "INT4, groups of 128": {"bits": 4, "group_size": 128},
    "INT4, groups of 128, prompts rounded": {"bits": 4, "group_size": 128, "exact_prefill": False},
    "INT4, output layer INT8": {"bits": 4, "output_bits": 8},
}
MAX_LOSS = 0.03

Pairs = list[tuple[str, str]]  # (prompt, right answer)


def load(folder: Path, bits: int, exact_prefill=True, **way) -> ChatGLMForConditionalGeneration:
    """Load a model that computes in float32, quantized from the checkpoint's own dtype."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).quantize(bits, **way).float()
    model.base_model.exact_prefill = exact_prefill
    return model


def share_right(model, tokenizer, pairs: Pairs) -> float:
    answers = answer(model, tokenizer, [prompt for prompt, _ in pairs])
    right = [given == expected for (given, _), (_, expected) in zip(answers, pairs, strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def force_answers(model, tokenizer, pairs: Pairs) -> tuple[float, torch.Tensor]:
    """Return the perplexity of the right answers, and the likeliest token at each of their places.

    As in training, an answer ends with eos.
    """
    loss, likeliest = 0.0, []
    for start in range(0, len(pairs), BATCH_SIZE):
        rows = [
            [*tokenizer.encode(prompt + expected), tokenizer.eos_token_id]
            for prompt, expected in pairs[start : start + BATCH_SIZE]
        ]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")  # on the left
        targets = inputs["input_ids"][:, 1:]
        is_answer = torch.zeros_like(targets, dtype=torch.bool)
        for i, (row, (prompt, _)) in enumerate(zip(rows, pairs[start:], strict=False)):
            is_answer[i, len(tokenizer.encode(prompt)) - len(row) :] = True
        logits = model(**inputs, is_prompt=True).logits[:, :-1][is_answer]
        loss += F.cross_entropy(logits, targets[is_answer], reduction="sum").item()
        likeliest.append(logits.argmax(-1))
    likeliest = torch.cat(likeliest)
    return torch.tensor(loss / len(likeliest)).exp().item(), likeliest


def draw_sets(tokenizer, sample_size: int) -> dict[str, Pairs]:
    """Return at most `sample_size` pairs of each language and set."""
    rng, sets = random.Random(0), {}
    for language in LANGUAGES:
        for name, pairs in question_sets(tokenizer, Dialogues(language)).items():
            sets[f"{language} {name}"] = rng.sample(pairs, min(sample_size, len(pairs)))
    return sets


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Measure what INT8 and INT4 cost chatglm2-tiny.")
    parser.add_argument("--model", type=Path, default=ROOT / "resources" / "chatglm2-tiny")
    parser.add_argument("--sample", type=int, default=340, help="questions of a set")
    args = parser.parse_args(argv)
    tokenizer = ChatGLMTokenizer.from_pretrained(args.model)
    sets = draw_sets(tokenizer, args.sample)
    pairs = sorted(chain(*sets.values()), key=lambda pair: len(pair[0] + pair[1]))
    print("|", *sets, "perplexity", "agreement", sep=" | ", end=" |\n")
    print("|---" * (len(sets) + 3), end="|\n")
    shares, reference = {}, None
    for name, way in WAYS.items():
        model = load(args.model, **way)
        shares[name] = [share_right(model, tokenizer, pairs) for pairs in sets.values()]
        perplexity, likeliest = force_answers(model, tokenizer, pairs)
        reference = likeliest if reference is None else reference
        agreement = (likeliest == reference).float().mean().item()
        cells = [f"{share:.1%}" for share in shares[name]]
        cells += [f"{perplexity:.4f}", f"{agreement:.2%}"]
        print(f"| {name}", *cells, sep=" | ", end=" |\n", flush=True)
    losses = [a - b for a, b in zip(shares["float32"], shares["INT4"], strict=True)]
    return int(max(losses) > MAX_LOSS)


if __name__ == "__main__":
    sys.exit(main())
