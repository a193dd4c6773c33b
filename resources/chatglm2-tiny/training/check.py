"""Measure how well `chatglm2-tiny` answers: the figures of its README and of docs/quantization.md.

    python resources/chatglm2-tiny/training/check.py [--model FOLDER]
    python resources/chatglm2-tiny/training/check.py --quantized

All answers are greedy and computed in float32. The first command asks all questions in each
language and exits with 1 if a figure misses its bar: learnt questions that get their own
dialogue's answer, held-out rewordings that get their intent's answer, held-out other questions
that get the demonstration sentence, learnt questions that wrongly get it, and answers that end
with eos.

With --quantized it asks a sample, with each kind of quantized weights. It then gives the models the
right answers, and prints their perplexity, the KL divergence from the unquantized model, and how
often the likeliest token differs; the last two also for the rounding of activations by the C
kernels. It exits with 1 if INT4 loses more than `MAX_LOSS` on a set.
"""

import argparse
import math
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
    "INT4": {"bits": 4},
    "INT4, groups of 128": {"bits": 4, "group_size": 128},
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


def load_quantized(folder: Path, bits: int, without_kernels=False, **options):
    """Load a model that computes in float32, quantized from the checkpoint's own dtype."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder)
    model = model.quantize(bits, **options).float()
    if without_kernels:
        model.base_model.backend.picked[model.device, model.dtype] = None
    return model


@torch.no_grad()
def force_answers(model, reference, tokenizer, pairs: Pairs) -> tuple[float, float, float]:
    """Give both models the right answers token by token. As in training, they end with eos.

    Returns:
        The perplexity of the answers, the mean KL divergence (in nats) of the reference's
        probabilities from the model's, and the share of positions whose likeliest token differs.
    """
    loss = divergence = num_changed = num_tokens = 0
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
        found, expected = (
            m(**inputs).logits[:, :-1][is_answer].double().log_softmax(-1)
            for m in (model, reference)
        )
        loss += F.nll_loss(found, targets[is_answer], reduction="sum").item()
        divergence += F.kl_div(found, expected, reduction="sum", log_target=True).item()
        num_changed += (found.argmax(-1) != expected.argmax(-1)).sum().item()
        num_tokens += len(found)
    return math.exp(loss / num_tokens), divergence / num_tokens, num_changed / num_tokens


def draw_sets(tokenizer, size: int) -> dict[str, Pairs]:
    """Return a sample of at most `size` questions of each language and set."""
    generator, sets = random.Random(0), {}
    for language in LANGUAGES:
        for name, pairs in list_questions(tokenizer, Dialogues(language)).items():
            sets[f"{language} {name}"] = generator.sample(pairs, min(size, len(pairs)))
    return sets


def format_difference(divergence: float, changed: float) -> tuple[str, str]:
    return f"{divergence:.1e}", f"{changed:.3%}"


def check_quantized(folder: Path, tokenizer) -> bool:
    """Print a table of the quantizations; return whether INT4 loses little."""
    sets = draw_sets(tokenizer, SAMPLE)
    all_pairs = sorted(chain(*sets.values()), key=lambda pair: len(pair[0] + pair[1]))
    print("|", *sets, "perplexity", "KL", "changed", sep=" | ", end=" |\n")
    print("|---" * (len(sets) + 4), end="|\n")
    shares, reference = {}, load_quantized(folder, 0)
    for name, options in QUANTIZATIONS.items():
        model = load_quantized(folder, **options)
        shares[name] = []
        for pairs in sets.values():
            answers = answer(model, tokenizer, [prompt for prompt, _ in pairs])
            expected = [text for _, text in pairs]
            right = [text == e for (text, _), e in zip(answers, expected, strict=True)]
            shares[name].append(sum(right) / len(right))
        perplexity, *figures = force_answers(model, reference, tokenizer, all_pairs)
        cells = [f"{share:.1%}" for share in shares[name]]
        cells += [f"{perplexity:.4f}", *format_difference(*figures)]
        print(f"| {name}", *cells, sep=" | ", end=" |\n", flush=True)
    print("\nRounding of activations: the kernels against plain PyTorch with the same weights")
    for name in list(QUANTIZATIONS)[1:]:
        models = (load_quantized(folder, **QUANTIZATIONS[name], without_kernels=b) for b in (0, 1))
        _, *figures = force_answers(*models, tokenizer, all_pairs)
        print(f"| {name}", *format_difference(*figures), sep=" | ", end=" |\n", flush=True)
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
