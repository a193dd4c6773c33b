"""Measure how well `chatglm2-tiny` answers: the figures of its README and of docs/quantization.md.

    python resources/chatglm2-tiny/training/check.py [--model FOLDER]
    python resources/chatglm2-tiny/training/check.py --quantized

All answers are greedy and computed in float32. The first command asks all questions in each
language and exits with 1 if a figure misses its bar: learnt questions that get their own
dialogue's answer, held-out rewordings that get their intent's answer, held-out other questions
that get the demonstration sentence, learnt questions that wrongly get it, and answers that end
with eos.

With --quantized it asks a sample, with each kind of quantized weights. It then feeds the right
answers token by token, and prints their perplexity and how often the likeliest token is that of
the unquantized model. Where prompts are rounded (by the C kernels only) these answers are rounded
too, which is more than a user gets. It exits with 1 if INT4 loses more than `MAX_LOSS` on a set.
"""

import argparse
import random
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils  # noqa: F401  # first: it explains which library is missing

# isort: split
import torch
import torch.nn.functional as F
from data import DEMONSTRATION, LANGUAGES, Dialogues
from tqdm import tqdm

from chatglm2 import ChatGLMForConditionalGeneration, ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[3]
BATCH_SIZE = 64
MAX_NEW_TOKENS = 320
BARS = {"learnt": 0.95, "reworded": 0.70, "other": 0.95, "mistaken": 0.05, "ended": 1.0}
QUANTIZATIONS = {
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
SAMPLE = 340  # questions of a set

Pairs = list[tuple[str, str]]  # (prompt, right answer)


@torch.no_grad()
def answer(model, tokenizer, prompts: list[str]) -> list[tuple[str, bool]]:
    """Return each prompt's greedy answer and whether it ended with eos."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = {}
    for start in tqdm(range(0, len(order), BATCH_SIZE), leave=False):
        chosen = order[start : start + BATCH_SIZE]
        inputs = tokenizer([prompts[i] for i in chosen], padding=True, return_tensors="pt")
        sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for i, ids in zip(chosen, new_ids, strict=True):
            has_ended = tokenizer.eos_token_id in ids
            answers[i] = model.process_response(tokenizer.decode(ids)), has_ended
    return [answers[i] for i in range(len(prompts))]


def list_learnt(tokenizer, data: Dialogues) -> Pairs:
    """Return all learnt questions; a follow-up has its history."""
    pairs = []
    for intent in data.intents:
        pairs += [(tokenizer.build_prompt(q), intent.answer) for q in intent.questions]
        history = [(intent.questions[0], intent.answer)]
        for follow_up in intent.follow_ups:
            prompts = [tokenizer.build_prompt(q, history) for q in follow_up.questions]
            pairs += [(prompt, follow_up.answer) for prompt in prompts]
    return pairs


def list_questions(tokenizer, data: Dialogues) -> dict[str, Pairs]:
    """Return the questions of each set."""
    others = [(question, DEMONSTRATION[data.language]) for question in data.held_out_others]
    return {
        "learnt": list_learnt(tokenizer, data),
        "reworded": [(tokenizer.build_prompt(q), expected) for q, expected in data.rewordings],
        "other": [(tokenizer.build_prompt(q), expected) for q, expected in others],
    }


def measure(model, tokenizer, data: Dialogues) -> tuple[dict[str, float], list[str]]:
    """Return the figures, and a line for each wrong answer to a held-out question."""
    figures, wrong, ends = {}, [], []
    for name, pairs in list_questions(tokenizer, data).items():
        answers = answer(model, tokenizer, [prompt for prompt, _ in pairs])
        texts = [text for text, _ in answers]
        ends += [has_ended for _, has_ended in answers]
        mistakes = [
            f"{name}: {prompt!r} -> {text!r}"
            for (prompt, expected), text in zip(pairs, texts, strict=True)
            if text != expected
        ]
        figures[name] = 1 - len(mistakes) / len(pairs)
        if name == "learnt":
            figures["mistaken"] = texts.count(DEMONSTRATION[data.language]) / len(texts)
        else:
            wrong += mistakes
    figures["ended"] = sum(ends) / len(ends)
    return figures, wrong


def check(folder: Path, tokenizer, prints_wrong: bool) -> bool:
    """Print the figures; return whether all reach their bars."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    has_passed = True
    for language in LANGUAGES:
        figures, wrong = measure(model, tokenizer, Dialogues(language))
        for name, figure in figures.items():
            is_met = figure < BARS[name] if name == "mistaken" else figure >= BARS[name]
            has_passed &= is_met
            print(f"{language} {name:8} {figure:6.1%} {'' if is_met else 'MISSED'}")
        if prints_wrong:
            print("\n".join(wrong))
    return has_passed


def load_quantized(folder: Path, bits: int, exact_prefill=True, **options):
    """Load a model that computes in float32, quantized from the checkpoint's own dtype."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder)
    model = model.quantize(bits, **options).float()
    model.base_model.exact_prefill = exact_prefill
    return model


@torch.no_grad()
def force_answers(model, tokenizer, pairs: Pairs) -> tuple[float, torch.Tensor]:
    """Return the perplexity of the right answers, and the likeliest token at each position.

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


def draw_sets(tokenizer, size: int) -> dict[str, Pairs]:
    """Return a sample of at most `size` questions of each language and set."""
    generator, sets = random.Random(0), {}
    for language in LANGUAGES:
        for name, pairs in list_questions(tokenizer, Dialogues(language)).items():
            sets[f"{language} {name}"] = generator.sample(pairs, min(size, len(pairs)))
    return sets


def check_quantized(folder: Path, tokenizer) -> bool:
    """Print a table of the quantizations; return whether INT4 loses little."""
    sets = draw_sets(tokenizer, SAMPLE)
    all_pairs = sorted(chain(*sets.values()), key=lambda pair: len(pair[0] + pair[1]))
    print("|", *sets, "perplexity", "agreement", sep=" | ", end=" |\n")
    print("|---" * (len(sets) + 3), end="|\n")
    shares, reference = {}, None
    for name, options in QUANTIZATIONS.items():
        model = load_quantized(folder, **options)
        shares[name] = []
        for pairs in sets.values():
            answers = answer(model, tokenizer, [prompt for prompt, _ in pairs])
            expected = [text for _, text in pairs]
            right = [text == e for (text, _), e in zip(answers, expected, strict=True)]
            shares[name].append(sum(right) / len(right))
        perplexity, likeliest = force_answers(model, tokenizer, all_pairs)
        reference = likeliest if reference is None else reference
        agreement = (likeliest == reference).float().mean().item()
        cells = [f"{share:.1%}" for share in shares[name]]
        cells += [f"{perplexity:.4f}", f"{agreement:.2%}"]
        print(f"| {name}", *cells, sep=" | ", end=" |\n", flush=True)
    losses = [a - b for a, b in zip(shares["float32"], shares["INT4"], strict=True)]
    return max(losses) <= MAX_LOSS


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Measure how well chatglm2-tiny answers.")
    parser.add_argument("--model", type=Path, default=ROOT / "resources" / "chatglm2-tiny")
    parser.add_argument("--quantized", action="store_true", help="compare quantized weights")
    parser.add_argument("--wrong", action="store_true", help="also print the wrong answers")
    args = parser.parse_args(argv)
    tokenizer = ChatGLMTokenizer.from_pretrained(args.model)
    if args.quantized:
        return int(not check_quantized(args.model, tokenizer))
    return int(not check(args.model, tokenizer, args.wrong))


if __name__ == "__main__":
    sys.exit(main())
