"""Measure the time to the first token of each round, with a kept cache and without.

    python resources/measure_rounds.py [--model resources/chatglm2-tiny] [--rounds 20]

Both ways run in turn, three times after a warm-up; the medians are printed in milliseconds.
"""

import argparse
import statistics
import sys
import time
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

QUERIES = ("你好", "讲个笑话", "thank you", "What is the capital of France?")
NUM_RUNS = 3


def run(model, tokenizer, num_rounds: int, keeps_cache: bool) -> list[float]:
    """Hold a conversation and return the seconds to the first token of each round."""
    history, cache, seconds = [], None, []
    for query in islice(cycle(QUERIES), num_rounds):
        start, first = time.perf_counter(), None
        for _, history, cache in model.stream_chat(  # noqa: B007, B020
            tokenizer, query, history, cache, do_sample=False, return_past_key_values=True
        ):
            first = first or time.perf_counter() - start
        if not keeps_cache:
            cache = None
        seconds.append(first)
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the time to the first token by round.")
    utils.add_model_arguments(parser)
    parser.set_defaults(model=str(ROOT / "resources" / "chatglm2-tiny"))
    parser.add_argument("--rounds", type=utils.number(int, 1), default=20)
    args = parser.parse_args(argv)
    tokenizer, model = utils.load_model(args)
    run(model, tokenizer, args.rounds, True)
    times = {True: [], False: []}
    for _ in range(NUM_RUNS):
        for keeps_cache, runs in times.items():
            runs.append(run(model, tokenizer, args.rounds, keeps_cache))
    for keeps_cache, runs in times.items():
        medians = [1e3 * statistics.median(round_times) for round_times in zip(*runs, strict=True)]
        name = "kept cache" if keeps_cache else "no cache"
        print(f"{name:10}", " ".join(f"{median:.1f}" for median in medians))


if __name__ == "__main__":
    main()
