"""Measure tokens/s, time to the first token and memory; compare precisions and llama.cpp.

    python evaluation/benchmark.py --random-weights --quantize 4
    python evaluation/benchmark.py --random-weights --quantize 4 --compare int8 llama-q4_0-f16

Each engine runs in a process of its own. The first engine is measured in turn with each other one:
A B A B ... While one computes, the other sleeps. A measurement is a call of `generate` that samples
as `chat` does. The tables show medians. GB are 10^9 bytes.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

# Workers import this file, and the one of llama.cpp must not load torch: neither does this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tables import format_table

import utils

OWN_ENGINES = {
    "int4": {"quantize": 4, "dtype": "auto"},
    "int8": {"quantize": 8, "dtype": "auto"},
    **{
        name: {"quantize": None, "quantize_output": False, "dtype": name}
        for name in ("bfloat16", "float16", "float32")
    },
}
LLAMA_ENGINES = {
    f"llama-{kind}-{output}": (kind, output)
    for kind in ("q4_0", "q8_0")
    for output in ("f16", "q8_0")
}
WARM_UP = {"prompt_tokens": 16, "new_tokens": 2}
STOP_TIMEOUT_S = 10
CHARACTERS_PER_TOKEN = 1.45  # of C-Eval's questions, with the official tokenizer


# Processes.


class WorkerError(Exception):
    """An engine cannot be loaded or measured; the message is one line."""


class Worker:
    """A process with the object `Worker` of a module; `ask` calls its methods."""

    def __init__(self, name: str, module: str):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, module), daemon=True)
        self.process.start()
        other.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self.connection.close()
        self.process.terminate()
        self.process.join(STOP_TIMEOUT_S)
        self.process.kill()
        self.process.join()

    def ask(self, method: str, **arguments):
        """Return the result of a method.

        Raises:
            WorkerError: The method failed, or the process has ended.
        """
        try:
            self.connection.send((method, arguments))
            result, error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            why = "was killed: is the memory full?" if code == -signal.SIGKILL else "ended"
            error = f"its process {why} (exit code {code})."
        if error is not None:
            raise WorkerError(f"{self.name}: {error}")
        return result


def serve(connection, module: str):
    """Answer the calls of `Worker.ask` until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.dup2(2, 1)  # stdout is for the report
    worker = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            worker = worker or import_module(module).Worker()
            result, error = getattr(worker, method)(**arguments), None
            if method == "measure":
                result.setdefault("memory_bytes", read_peak_memory())
        except (SystemExit, OSError, ValueError, RuntimeError, MemoryError, ImportError) as failure:
            result, error = None, " ".join(str(failure).split()) or type(failure).__name__
        connection.send((result, error))


def read_peak_memory() -> int | None:
    """Return the peak memory of this process in bytes, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would include the parent's memory
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


# Measuring.


def show(text: str):
    print(text, file=sys.stderr, flush=True)


def start_engine(words: str, args: argparse.Namespace, shape: dict, folder: Path) -> Worker:
    """Return the worker of an engine, with the engine loaded.

    Args:
        words: A name of OWN_ENGINES with flags, or of LLAMA_ENGINES; "" is the model of `args`.
        folder: Where the file for llama.cpp is written.

    Raises:
        WorkerError: The engine cannot be loaded.
    """
    show(f"loading {words or 'the model'}")
    module, settings = "benchmark_model", vars(args)
    name, *flags = words.split() or [""]
    if name in LLAMA_ENGINES:
        try:
            settings = prepare_llama(folder / f"{name}.gguf", args, shape, *LLAMA_ENGINES[name])
        except (OSError, ValueError) as error:
            raise WorkerError(f"{words}: {error}") from error
        module, settings["threads"] = "benchmark_llama", args.threads
    elif name:
        parser = argparse.ArgumentParser(prog=f"--compare {name}", usage=argparse.SUPPRESS)
        utils.add_model_arguments(parser)
        own = argparse.Namespace(**settings | OWN_ENGINES[name])
        settings = vars(parser.parse_args(flags, own))
    worker = Worker(words or "the model", module)
    try:
        worker.load = worker.ask("load", **settings)
        if name in OWN_ENGINES and worker.load["name"] != name:
            raise WorkerError(f"{words}: the checkpoint has {worker.load['name']} weights")
    except WorkerError:
        worker.close()
        raise
    worker.name = words or worker.load["name"]
    return worker


def prepare_llama(file: Path, args: argparse.Namespace, shape: dict, kind: str, output: str):
    """Write a file for llama.cpp: of the checkpoint's weights, or random.

    Returns:
        The arguments of `load` of its worker, but the threads.
    """
    import benchmark_llama

    if args.random_weights:
        benchmark_llama.write_gguf(file, shape, kind, output)
    else:
        import benchmark_model

        benchmark_model.write_gguf(args, file, kind)
    return benchmark_llama.describe_file(file, shape)


def run_rounds(workers: list[Worker], cases: list[dict], read_bandwidth, num_rounds: int) -> list:
    """Measure the workers in turn; return for each worker and case the figures of the rounds."""
    found = [[[] for _ in cases] for _ in workers]
    for worker in workers:
        worker.ask("measure", **WARM_UP)
    for _ in range(num_rounds):
        for i, case in enumerate(cases):
            bandwidth = read_bandwidth()
            for worker, rounds in zip(workers, found, strict=True):
                figures = worker.ask("measure", **case) | {"bandwidth": bandwidth}
                rounds[i].append(figures)
                speed = (case["new_tokens"] - 1) / figures["decode_s"]
                show(
                    f"{worker.name}, prompt of {case['prompt_tokens']} tokens: first token after "
                    f"{figures['first_token_s']:.2f} s, then {speed:.2f} tokens/s"
                )
    return found


def measure_engines(args: argparse.Namespace, shape: dict, read_bandwidth) -> dict:
    """Measure the first engine in turn with each engine of --compare.

    An engine of --compare that cannot be loaded is left out, with the reason.
    """
    cases = [{"prompt_tokens": n, "new_tokens": args.new_tokens} for n in args.prompt_tokens]
    rounds, engines, left_out = [[] for _ in cases], [], {}
    with TemporaryDirectory() as folder, start_engine("", args, shape, Path(folder)) as first:
        for words in args.compare:
            try:
                other = start_engine(words, args, shape, Path(folder))
            except WorkerError as error:
                left_out[words] = str(error)
                continue
            with other:
                mine, new = run_rounds([first, other], cases, read_bandwidth, args.rounds)
            rounds = [old + more for old, more in zip(rounds, mine, strict=True)]
            engines.append(summarize(other, cases, new, mine))
        if not engines:
            (rounds,) = run_rounds([first], cases, read_bandwidth, args.rounds)
    rates = [figures["bandwidth"] / 1e9 for figures in chain(*rounds)]
    return {
        "rounds": args.rounds,
        "read_bandwidth_gb_per_s": statistics.median(rates),
        "read_bandwidth_rounds": rates,
        "engines": [summarize(first, cases, rounds), *engines],
        "left_out": left_out,
    }


def summarize(worker: Worker, cases: list[dict], rounds: list, reference: list | None = None):
    """Return the medians of an engine, and of its ratios to the engine measured in turn with it."""
    rows = []
    for i, (case, figures) in enumerate(zip(cases, rounds, strict=True)):
        row = summarize_case(case, figures, worker.load["weight_bytes"])
        if reference is not None:
            row["reference_is_faster"] = {
                name: statistics.median(
                    theirs[f"{name}_s"] / mine[f"{name}_s"]
                    for theirs, mine in zip(figures, reference[i], strict=True)
                )
                for name in ("first_token", "decode")
            }
        rows.append(row)
    peaks = [figures["memory_bytes"] for figures in chain(*rounds)]
    return {
        "name": worker.name,
        "description": worker.load["description"],
        "load_s": worker.load["load_s"],
        "weights_gb_per_token": worker.load["weight_bytes"] / 1e9,
        "memory_gb": None if None in peaks else max(peaks) / 1e9,
        "cases": rows,
    }


def summarize_case(case: dict, rounds: list[dict], weight_bytes: int) -> dict:
    """Return the medians of the rounds.

    A new token reads the weights, and the keys and values that the cache holds on average. The rate
    is compared with the read bandwidth that was measured just before.
    """
    steps = case["new_tokens"] - 1
    first_s = statistics.median(figures["first_token_s"] for figures in rounds)
    step_s = statistics.median(figures["decode_s"] / steps for figures in rounds)
    held = case["prompt_tokens"] + case["new_tokens"] / 2
    read_bytes = weight_bytes + held * rounds[0]["cache_bytes"]
    written = [figures["characters"] for figures in rounds if "characters" in figures]
    per_token = statistics.mean(written) / case["new_tokens"] if written else CHARACTERS_PER_TOKEN
    return {
        **case,
        "first_token_s": first_s,
        "prompt_tokens_per_s": case["prompt_tokens"] / first_s,
        "tokens_per_s": 1 / step_s,
        "tokens_per_s_rounds": [steps / figures["decode_s"] for figures in rounds],
        "characters_per_s": per_token / step_s,
        "read_gb_per_token": read_bytes / 1e9,
        "read_gb_per_s": read_bytes / step_s / 1e9,
        "fraction_of_bandwidth": statistics.median(
            read_bytes * steps / figures["decode_s"] / figures["bandwidth"] for figures in rounds
        ),
    }


# Tables and the plot.


SPEED = [  # header, key of a row, format
    ("first token, s", "first_token_s", ".3f"),
    ("prompt tokens/s", "prompt_tokens_per_s", ".1f"),
    ("tokens/s", "tokens_per_s", ".2f"),
    ("characters/s", "characters_per_s", ".1f"),
    ("memory, GB", "memory_gb", ".2f"),
    ("{} is faster: first token", "first_token", ".2f"),
    ("tokens/s", "decode", ".2f"),
]
READS = [
    ("GB/token", "read_gb_per_token", ".3f"),
    ("weights, GB", "weights_gb_per_token", ".3f"),
    ("GB/s", "read_gb_per_s", ".1f"),
    ("of the bandwidth", "fraction_of_bandwidth", ".0%"),
]


def format_engines(engines: list[dict], columns: list[tuple[str, str, str]]) -> str:
    """Return a table with a row for each case of each engine."""
    rows = []
    for engine in engines:
        for case in engine["cases"]:
            row = engine | case | case.get("reference_is_faster", {})
            figures = [(row.get(key), spec) for _, key, spec in columns]
            cells = ["" if figure is None else format(figure, spec) for figure, spec in figures]
            rows.append([engine["name"], str(case["prompt_tokens"]), *cells])
    header = [title.format(engines[0]["name"]) for title, *_ in columns]
    return format_table(["engine", "prompt", *header], rows)


def print_report(report: dict):
    machine, engines = report["machine"], report["engines"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    notes = [f"{e['name']}: {e['description']}; loaded in {e['load_s']:.1f} s" for e in engines]
    notes += [f"left out: {error}" for error in report["left_out"].values()]
    rates = report["read_bandwidth_rounds"]
    parts = [
        f"{report['model']}, {report['shape']['num_layers']} layers of "
        f"{report['shape']['hidden_size']}; {machine['processor']}{device}, {machine['threads']} "
        f"threads; {versions}",
        f"Medians of {report['rounds']} rounds, the engines in turn; answers of "
        f"{engines[0]['cases'][0]['new_tokens']} tokens:",
        format_engines(engines, SPEED),
        f"Reads of a new token (read bandwidth, measured in turn with the engines: "
        f"{report['read_bandwidth_gb_per_s']:.1f} GB/s, {min(rates):.1f} to {max(rates):.1f}):",
        format_engines(engines, READS),
        "\n".join(notes),
    ]
    if report["model"] == "random weights":
        parts.append(
            f"Characters: {CHARACTERS_PER_TOKEN} for each token, as in C-Eval's questions with the "
            "official tokenizer, because random weights write no text."
        )
    print("\n\n".join(parts))


def draw_plot(report: dict, file: Path):
    """Draw the first case of each engine as bars."""
    from matplotlib import pyplot

    cases = {engine["name"]: engine["cases"][0] for engine in report["engines"]}
    titles = {
        "tokens_per_s": "New tokens per second, one conversation",
        "prompt_tokens_per_s": "Prompt tokens per second",
    }
    figure, panels = pyplot.subplots(2, figsize=(9, 2 + len(cases)), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        bars = panel.barh([*cases], [case[key] for case in cases.values()])
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.set_title(title)
        panel.invert_yaxis()
    figure.savefig(file)


# Arguments.


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    utils.add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights in the shape of ChatGLM2-6B, or of the config.json of --model",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=utils.number(int, 1),
        nargs="+",
        default=[512],
        metavar="N",
        help="length of the prompt, or several lengths (default: 512)",
    )
    parser.add_argument(
        "--new-tokens",
        type=utils.number(int, 2),
        default=64,
        metavar="N",
        help="length of the answer (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=utils.number(int, 1),
        default=3,
        metavar="N",
        help="measurements of each engine (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="ENGINE",
        help=f"{', '.join(OWN_ENGINES)}, also with flags in quotes ('int4 --quantize-output'); "
        f"{', '.join(LLAMA_ENGINES)} (weights, output layer)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the report; needs matplotlib"
    )
    args = parser.parse_args(argv)
    check_args(args)
    if args.model is None and not args.random_weights:
        args.model = os.environ.get("CHATGLM_MODEL") or utils.DEFAULT_MODEL
    return args


def check_args(args: argparse.Namespace):
    """Refuse flags that would have no effect, and packages that are missing."""
    if args.num_gpus > 1 or args.offload_folder:
        raise SystemExit("--num-gpus and --offload-folder: the benchmark measures one device.")
    for name in ("revision", "adapter"):
        if args.random_weights and (value := getattr(args, name)):
            raise SystemExit(f"--{name} {value}: leave it or --random-weights out.")
    for words in args.compare:
        name = words.split()[0] if words.split() else ""
        if name not in [*OWN_ENGINES, *LLAMA_ENGINES] or (name in LLAMA_ENGINES and words != name):
            raise SystemExit(
                f"--compare {words!r}: there are {', '.join([*OWN_ENGINES, *LLAMA_ENGINES])}; the "
                f"first {len(OWN_ENGINES)} can be followed by flags of the model, in quotes."
            )
        if name in LLAMA_ENGINES and not (find_spec("llama_cpp") and find_spec("gguf")):
            raise SystemExit(f"--compare {name} needs packages: pip install llama-cpp-python gguf")
        if name.endswith("-q8_0") and name in LLAMA_ENGINES and not args.random_weights:
            raise SystemExit(
                f"--compare {name}: the file of a checkpoint keeps its output layer: give "
                f"{name.removesuffix('q8_0')}f16, or --random-weights."
            )
        if name in LLAMA_ENGINES and args.adapter:
            raise SystemExit(
                f"--compare {name}: llama.cpp gets no --adapter: leave one of them out."
            )
    if args.plot and not find_spec("matplotlib"):
        raise SystemExit(
            f"--plot {args.plot} needs matplotlib, which is not in requirements.txt: "
            "pip install matplotlib"
        )


def measure(args: argparse.Namespace) -> dict:
    import benchmark_model

    setting = benchmark_model.describe_setting(args)
    reader = benchmark_model.BandwidthReader(args)
    return setting | measure_engines(args, setting["shape"], reader.read)


def main(argv=None):
    args = parse_args(argv)
    try:
        report = measure(args)
    except WorkerError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    if args.plot:
        draw_plot(report, args.plot)


if __name__ == "__main__":
    utils.run_script(main)
