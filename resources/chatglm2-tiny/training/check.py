"""Measure what `chatglm2-tiny` answers: the figures of its README.

    python resources/chatglm2-tiny/training/check.py [--model resources/chatglm2-tiny]

Per language, greedily: learnt questions that get their own dialogue's answer, held-out rewordings
that get their intent's, held-out other questions that get the demonstration sentence, learnt
questions that wrongly get it, and answers that end with eos. Exits with 1 if a bar is missed.
"""

import argparse
import sys
from pathlib import Path

import torch
from data import DEMONSTRATION, LANGUAGES, Dialogues
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from chatglm2 import ChatGLMForConditionalGeneration, ChatGLMTokenizer  # noqa: E402

BATCH_SIZE = 64
MAX_NEW_TOKENS = 320
BARS = {"learnt": 0.95, "reworded": 0.70, "other": 0.95, "mistaken": 0.05, "ended": 1.0}


@torch.no_grad()
def answer(model, tokenizer, prompts: list[str]) -> list[tuple[str, bool]]:
    """Return each prompt's greedy answer and whether it ended by itself."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = {}
    for start in tqdm(range(0, len(order), BATCH_SIZE), leave=False):
        chosen = order[start : start + BATCH_SIZE]
        inputs = tokenizer([prompts[i] for i in chosen], padding=True, return_tensors="pt")
        sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        for i, ids in zip(
            chosen, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True
        ):
            has_ended = tokenizer.eos_token_id in ids
            answers[i] = model.process_response(tokenizer.decode(ids)), has_ended
    return [answers[i] for i in range(len(prompts))]


def learnt_prompts(tokenizer, data: Dialogues) -> list[tuple[str, str]]:
    """Return (prompt, answer) of every learnt question; a follow-up has its history."""
    pairs = []
    for intent in data.intents:
        pairs += [(tokenizer.build_prompt(q), intent.answer) for q in intent.questions]
        history = [(intent.questions[0], intent.answer)]
        for follow_up in intent.follow_ups:
            prompts = [tokenizer.build_prompt(q, history) for q in follow_up.questions]
            pairs += [(prompt, follow_up.answer) for prompt in prompts]
    return pairs


def question_sets(tokenizer, data: Dialogues) -> dict[str, list[tuple[str, str]]]:
    """Return the (prompt, right answer) pairs of each set."""
    return {
        "learnt": learnt_prompts(tokenizer, data),
        "reworded": [(tokenizer.build_prompt(q), expected) for q, expected in data.rewordings],
        "other": [
            (tokenizer.build_prompt(q), DEMONSTRATION[data.language]) for q in data.held_out_others
        ],
    }


def measure(model, tokenizer, data: Dialogues) -> tuple[dict[str, float], list[str]]:
    """Return the figures and a line for each held-out question that went wrong."""
    figures, wrong, num_ended, num_asked = {}, [], 0, 0
    for name, pairs in question_sets(tokenizer, data).items():
        answers = answer(model, tokenizer, [prompt for prompt, _ in pairs])
        right = [
            given == expected for (given, _), (_, expected) in zip(answers, pairs, strict=True)
        ]
        figures[name] = sum(right) / len(right)
        num_ended += sum(has_ended for _, has_ended in answers)
        num_asked += len(answers)
        if name == "learnt":
            given = [text for text, _ in answers]
            figures["mistaken"] = given.count(DEMONSTRATION[data.language]) / len(given)
        else:
            wrong += [
                f"{name}: {prompt!r} -> {given!r}"
                for is_right, (prompt, _), (given, _) in zip(right, pairs, answers, strict=True)
                if not is_right
            ]
    figures["ended"] = num_ended / num_asked
    return figures, wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what chatglm2-tiny answers.")
    parser.add_argument("--model", type=Path, default=ROOT / "resources" / "chatglm2-tiny")
    parser.add_argument("--wrong", action="store_true", help="also print what went wrong")
    args = parser.parse_args(argv)
    tokenizer = ChatGLMTokenizer.from_pretrained(args.model)
    model = ChatGLMForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    has_missed = False
    for language in LANGUAGES:
        figures, wrong = measure(model, tokenizer, Dialogues(language))
        for name, figure in figures.items():
            is_met = figure < BARS[name] if name == "mistaken" else figure >= BARS[name]
            has_missed |= not is_met
            print(f"{language} {name:8} {figure:6.1%} {'' if is_met else 'MISSED'}")
        if args.wrong:
            print("\n".join(wrong))
    return int(has_missed)


if __name__ == "__main__":
    sys.exit(main())
