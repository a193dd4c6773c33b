"""Measure what prompt lookup gains where an answer quotes, and what a step of several tokens costs.

    python resources/measure_lookup.py [--model resources/chatglm2-tiny] [--prompt-lookup 10]

Each question is asked twice in a conversation, so that the second answer repeats the first; the
second is generated with and without lookup in turn, and both must have the same ids. The cost is
that of a step with N + 1 tokens in steps of one, after 128 tokens; it needs no trained weights:
`--cost` measures only that.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from chatglm2 import ChatGLMCache  # noqa: E402

QUERIES = ("讲个故事", "讲个笑话", "tell me a story", "tell me a joke")
NUM_RUNS, NUM_STEPS, NUM_KEPT = 5, 15, 128


def generate(model, ids: list[int], num_tokens: int | None) -> tuple[list[int], int, float]:
    """Continue greedily; return the new ids, the number of steps and the seconds."""
    lookup = {"prompt_lookup_num_tokens": num_tokens} if num_tokens else {}
    steps = []
    hook = model.transformer.register_forward_pre_hook(lambda *_: steps.append(None))
    start = time.perf_counter()
    output = model.generate(torch.tensor([ids], device=model.device), max_new_tokens=256, **lookup)
    seconds = time.perf_counter() - start
    hook.remove()
    return output[0, len(ids) :].tolist(), len(steps), seconds


def measure_quoting(model, tokenizer, num_tokens: int) -> list[tuple]:
    """Return for each question its answer's length, the steps with lookup, and both tokens/s."""
    rows = []
    for query in QUERIES:
        _, history = model.chat(tokenizer, query, do_sample=False)
        ids = tokenizer.encode(tokenizer.build_prompt(query, history))
        speeds = {None: [], num_tokens: []}
        for _ in range(NUM_RUNS):
            answers = {}
            for lookup, measured in speeds.items():
                answers[lookup], num_steps, seconds = generate(model, ids, lookup)
                measured.append(len(answers[lookup]) / seconds)
            if answers[None] != answers[num_tokens]:
                raise SystemExit(f"{query}: the ids with prompt lookup are other ones.")
        medians = [statistics.median(measured) for measured in speeds.values()]
        rows.append((query, len(answers[None]), num_steps, *medians))
    return rows


@torch.inference_mode()
def measure_cost(model, counts: list[int]) -> dict[int, float]:
    """Return the time of a step with so many tokens, in steps of one token in turn with it."""
    cache, ratios = ChatGLMCache(), {count: [] for count in counts}
    ids = torch.arange(NUM_KEPT, device=model.device)[None] % model.config.padded_vocab_size
    model(ids, past_key_values=cache, return_last_logit=True)
    for _ in range(NUM_STEPS):
        seconds = {}
        for count in (1, *counts):
            start = time.perf_counter()
            model(ids[:, :count], past_key_values=cache).logits.argmax(-1).tolist()
            seconds[count] = time.perf_counter() - start
            cache.crop(-count)
        for count in counts:
            ratios[count].append(seconds[count] / seconds[1])
    return {count: statistics.median(measured) for count, measured in ratios.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what prompt lookup gains and costs.")
    utils.add_model_arguments(parser)
    parser.set_defaults(model=str(ROOT / "resources" / "chatglm2-tiny"))
    parser.add_argument("--prompt-lookup", type=utils.number(int, 1), default=10, metavar="N")
    parser.add_argument("--cost", action="store_true", help="only what a step costs")
    args = parser.parse_args(argv)
    tokenizer, model = utils.load_model(args)
    if not args.cost:
        print("question, tokens, steps with lookup, tokens/s without and with it, ratio")
        for query, length, num_steps, plain, lookup in measure_quoting(
            model, tokenizer, args.prompt_lookup
        ):
            print(f"{query}: {length} {num_steps} {plain:.1f} {lookup:.1f} {lookup / plain:.2f}")
    costs = measure_cost(model, sorted({2, 5, args.prompt_lookup + 1}))
    for count, cost in costs.items():
        print(f"a step of {count} tokens costs {cost:.2f} steps of one")


if __name__ == "__main__":
    main()
