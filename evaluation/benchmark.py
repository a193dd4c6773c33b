"""Measure tokens/s, first token and memory, in turn with other precisions and llama.cpp.

    python evaluation/benchmark.py --random-weights --quantize 4
    python evaluation/benchmark.py --random-weights --quantize 4 --compare int8 llama-q4_0-f16
    python evaluation/benchmark.py --from-json report.json --plot plot.png

Every engine is a process of its own that sleeps while another one is measured: A B A B in each
round. A round is a call of the public `generate`, sampling as `chat` does; the time to the first
token is that of the prompt. Medians of the rounds are shown.
"""

import argparse
import json
import platform
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmark_model import read_shape  # also makes the repository's folder one of modules
from benchmark_report import CHARACTERS_PER_TOKEN, draw_plot, print_report, summarize, to_gigabytes
from benchmark_worker import Worker, WorkerError

import utils
from chatglm2 import ChatGLMConfig, hardware, loading
from chatglm2.errors import one_line
from chatglm2.placement import MEMORY_MARGIN, count_weight_bytes

MODEL_WORKER = Path(__file__).with_name("benchmark_model.py")
LLAMA_WORKER = Path(__file__).with_name("benchmark_llama.py")
OWN_ENGINES = {
    "int4": {"quantize": 4, "dtype": "auto"},
    "int8": {"quantize": 8, "dtype": "auto"},
    **{
        name: {"quantize": None, "quantize_output": False, "dtype": name}
        for name in ("bfloat16", "float16", "float32")
    },
}
LLAMA_BITS = {"q4_0": 4.5, "q6_k": 6.5625, "q8_0": 8.5, "f16": 16}  # of a weight, scales included
LLAMA_ENGINES = {
    f"llama-{kind}" + (f"-{output}" if output != kind else ""): (kind, output)
    for kind in ("q4_0", "q8_0")
    for output in LLAMA_BITS
}
PROCESS_BYTES = 800_000_000  # of a worker beside its weights
READER_BYTES = 1_500_000_000  # of the one that measures the read bandwidth
WARM_UP = {"context": 0, "prompt_tokens": 16, "new_tokens": 2}
# The original's tables: tokens of prompt and answer, of a prompt, of prompt and answer.
SPEED_LENGTH, ENCODED_LENGTH, GENERATED_LENGTH = 2048, 2048, 8192
FIRST_LENGTH = 32  # of the prompts of what is generated there
LAST_TOKENS = 64  # generated behind random keys and values


@dataclass
class Engine:
    """What is measured.

    Attributes:
        command: Starts its worker.
        settings: Arguments of the worker's `load`.
        needed: Bytes of memory, an estimate.
        cases: Arguments of the worker's `measure`.
        file: Arguments of the worker's `make`, which returns the path to be loaded; or None.
    """

    name: str
    command: list[str]
    settings: dict
    needed: float
    cases: list[dict]
    file: dict | None = None


# Which engines, and which of them at a time.


def describe_shape(config: ChatGLMConfig) -> dict:
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.kv_channels,
        "vocab_size": config.padded_vocab_size,
        "seq_length": config.seq_length,
    }


def make_case(context: int, prompt_tokens: int, new_tokens: int) -> dict:
    """Return how many tokens are in a random cache, in the prompt and in the answer."""
    return {"context": context, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def list_cases(args: argparse.Namespace) -> list[dict]:
    cases = [make_case(0, length, args.new_tokens) for length in args.prompt_tokens]
    if args.random_context:
        cases.append(make_case(args.random_context, 1, args.new_tokens))
    return cases


def plan_own(words: str, args: argparse.Namespace, config: ChatGLMConfig, cases) -> Engine:
    """Return this project's model: `words` are a name of OWN_ENGINES and flags, or nothing."""
    name, *flags = words.split() or [""]
    parser = argparse.ArgumentParser(prog=f"--compare {name}", usage=argparse.SUPPRESS)
    utils.add_model_arguments(parser)
    wanted = argparse.Namespace(**vars(args) | OWN_ENGINES.get(name, {}))
    parser.parse_args(flags, wanted)
    quantization = loading.choose_quantization(wanted, config)
    if name and quantization and not wanted.quantize:
        raise SystemExit(
            f"--compare {words}: the weights have {quantization.bits} bits already: leave it out."
        )
    own = config.dtype or torch.float16
    device, dtype, _ = loading.choose_device_and_dtype(wanted.device, wanted.dtype, own)
    needed = count_weight_bytes(config, dtype, quantization) * MEMORY_MARGIN
    longest = max(sum(case.values()) for case in cases)
    cache_dtype = loading.DTYPES.get(wanted.kv_cache_dtype, dtype)
    heads = config.num_key_value_heads * config.kv_channels
    needed += 2 * config.num_layers * heads * longest * cache_dtype.itemsize
    needed += PROCESS_BYTES if device.type == "cpu" else 0
    label = f"int{quantization.bits}" if quantization else str(dtype).removeprefix("torch.")
    needs = [*vars(parser.parse_args([])), "random_weights", "config", "layers"]
    settings = {key: value for key, value in vars(wanted).items() if key in needs}
    command = [sys.executable, str(MODEL_WORKER)]
    return Engine(" ".join([label, *flags]), command, settings, needed, cases)


def plan_llama(name: str, args: argparse.Namespace, config: ChatGLMConfig, folder: Path) -> Engine:
    kind, output = LLAMA_ENGINES[name]
    shape = describe_shape(config)
    hidden, vocab_weights = config.hidden_size, config.padded_vocab_size * config.hidden_size
    heads = 2 * shape["num_heads"] + 2 * shape["num_kv_heads"]  # queries, output; keys, values
    block = hidden * (heads * shape["head_dim"] + 3 * config.ffn_hidden_size)
    bits = (config.num_layers * block + vocab_weights) * LLAMA_BITS[kind]
    bits += vocab_weights * LLAMA_BITS[output]
    file = {"shape": shape, "kind": kind.upper(), "output_kind": output.upper()}
    file["folder"] = str(folder)
    settings = {"shape": shape, "threads": args.threads or torch.get_num_threads()}
    command = [args.llama_python or sys.executable, str(LLAMA_WORKER)]
    cases = [case for case in list_cases(args) if not case["context"]]
    return Engine(name, command, settings, bits / 8 + PROCESS_BYTES, cases, file)


def check_llama(python: str):
    """Stop if the Python for llama.cpp lacks it."""
    try:
        with Worker("llama.cpp", [python, str(LLAMA_WORKER)]) as worker:
            worker.ask("check")
    except WorkerError as error:
        raise SystemExit(
            f"{error} in {python}: pip install llama-cpp-python gguf, or name a Python that has "
            "them with --llama-python."
        ) from error


def plan_engines(args: argparse.Namespace, config: ChatGLMConfig, folder: Path) -> list[Engine]:
    """Return the engines, the reference first.

    Raises:
        SystemExit: A name is not known, or llama-cpp-python is missing.
    """
    known = [*OWN_ENGINES, *LLAMA_ENGINES]
    for words in args.compare:
        name = words.split()[0] if words.split() else ""
        if name not in known or (name in LLAMA_ENGINES and words != name):
            raise SystemExit(
                f"--compare {words!r}: there are {', '.join(known)}; behind the first "
                f"{len(OWN_ENGINES)} flags of this program can follow, in the same quotes."
            )
    if set(args.compare) & set(LLAMA_ENGINES):
        check_llama(args.llama_python or sys.executable)
    elif args.llama_python:
        raise SystemExit(f"--llama-python {args.llama_python} needs --compare llama-q4_0 or so.")
    engines = [plan_own("", args, config, list_cases(args))]
    for words in args.compare:
        if words in LLAMA_ENGINES:
            engines.append(plan_llama(words, args, config, folder))
        else:
            engines.append(plan_own(words, args, config, list_cases(args)))
    planned = {}
    for engine in engines:
        planned.setdefault(engine.name, engine)
    return list(planned.values())


def group_engines(engines: list[Engine], free: float | None) -> tuple[list[list[Engine]], dict]:
    """Return groups that fit into memory at a time, and what fits into none, with the reason.

    The first engine is the reference and in every group, so that its ratios are of one run.
    """
    reference, *others = engines
    free = float("inf") if free is None else free
    left_out = {
        engine.name: f"needs {hardware.gigabytes(engine.needed)} beside {reference.name}, "
        f"{hardware.gigabytes(max(free - reference.needed, 0))} free"
        for engine in others
        if reference.needed + engine.needed > free
    }
    groups, others = [], [engine for engine in others if engine.name not in left_out]
    while others or not groups:
        group, used = [reference], reference.needed
        for engine in list(others):
            if used + engine.needed <= free:
                group.append(engine)
                others.remove(engine)
                used += engine.needed
        groups.append(group)
    return groups, left_out


# Measuring.


def show(text: str):
    print(text, file=sys.stderr, flush=True)


def run_rounds(workers: dict, cases: dict, read_bandwidth, num_rounds: int):
    """Measure all workers in turn, case by case; yield (name, case, figures).

    Args:
        workers: By the engines' names, loaded.
        cases: Of each engine.
        read_bandwidth: Measured before each case, too; yielded under the name "".
    """
    every = []
    for case in (case for name in workers for case in cases[name]):
        if case not in every:
            every.append(case)
    for worker in workers.values():
        worker.ask("measure", **WARM_UP)
    for _ in range(num_rounds):
        for case in every:
            yield "", case, read_bandwidth()
            for name, worker in workers.items():
                if case in cases[name]:
                    yield name, case, worker.ask("measure", **case)


def make_file(engine: Engine) -> dict:
    """Make what the engine loads, by a process of its own, whose memory is not to be counted."""
    if engine.file is None:
        return {}
    with Worker(engine.name, engine.command) as worker:
        return {"path": worker.ask("make", **engine.file)}


def measure_group(group: list[Engine], args: argparse.Namespace, left_out: dict) -> dict:
    """Return read bandwidths and what each engine's worker said.

    An engine that cannot be loaded is left out, unless it is the reference.
    """
    found, bandwidths, workers = {}, [], {}
    cases = {engine.name: engine.cases for engine in group}
    with ExitStack() as stack:
        for engine in group:
            show(f"loading {engine.name}")
            try:
                settings = engine.settings | make_file(engine)
                worker = stack.enter_context(Worker(engine.name, engine.command))
                load = worker.ask("load", **settings)
            except WorkerError as error:
                if engine is group[0]:
                    raise
                left_out[engine.name] = str(error)
                continue
            workers[engine.name] = worker
            found[engine.name] = {"load": load, "cases": [(case, []) for case in engine.cases]}
        reader = stack.enter_context(Worker("read bandwidth", [sys.executable, str(MODEL_WORKER)]))
        reader.ask("load_reader", threads=args.threads, device=args.device)
        for name, case, figures in run_rounds(
            workers, cases, lambda: reader.ask("read"), args.rounds
        ):
            if not name:
                bandwidths.append(figures)
                continue
            figures["bandwidth"] = bandwidths[-1]
            found[name]["cases"][cases[name].index(case)][1].append(figures)
            speed = (case["new_tokens"] - 1) / figures["decode_s"]
            show(
                f"{name}, {case['context'] + case['prompt_tokens']} tokens: first token after "
                f"{figures['first_token_s']:.2f} s, then {speed:.2f} tokens/s"
            )
    return {"bandwidths": bandwidths, "engines": found}


def measure_once(engine: Engine) -> dict:
    """Return the figures of the engine's only case, in a process that does nothing else."""
    (case,) = engine.cases
    prompt = case["context"] + case["prompt_tokens"]
    show(f"{engine.name}: {case['new_tokens']} tokens behind {prompt}")
    with Worker(engine.name, engine.command) as worker:
        worker.ask("load", **engine.settings)
        return worker.ask("measure", **case)


def measure_original_tables(args: argparse.Namespace, config: ChatGLMConfig) -> dict:
    """Return what the original's tables hold, for each precision that fits into memory.

    The speed is that of all tokens up to SPEED_LENGTH, the prompt's time included.
    """
    speed_case = make_case(0, FIRST_LENGTH, SPEED_LENGTH - FIRST_LENGTH)
    encode_case = make_case(0, ENCODED_LENGTH, 2)
    generate_case = make_case(0, FIRST_LENGTH, GENERATED_LENGTH - FIRST_LENGTH)
    if args.random_weights:
        generate_case = make_case(GENERATED_LENGTH - LAST_TOKENS - 1, 1, LAST_TOKENS)
    device, _ = loading.choose_device(args.device)
    names = ["bfloat16" if device.type == "cpu" else "float16", "int8", "int4"]
    if config.quantization_bit:
        names = [f"int{config.quantization_bit}"]
    rows = {}
    for name in names:
        cases = [speed_case, encode_case, generate_case]
        engines = [plan_own(name, args, config, [case]) for case in cases]
        free, needed = hardware.get_free_memory(device), engines[-1].needed
        if free is not None and needed > free:
            rows[name] = {"left_out": f"needs {hardware.gigabytes(needed)}"}
            continue
        speed, encode, generate = map(measure_once, engines)
        seconds, count = speed["first_token_s"] + speed["decode_s"], speed_case["new_tokens"]
        rows[name] = {
            "tokens_per_s": count / seconds,
            "characters_per_s": speed.get("characters", count * CHARACTERS_PER_TOKEN) / seconds,
            "encode_memory_gb": to_gigabytes(encode["memory_bytes"]),
            "generate_memory_gb": to_gigabytes(generate["memory_bytes"]),
        }
    return {
        "lengths": [SPEED_LENGTH, ENCODED_LENGTH, GENERATED_LENGTH],
        "random_context": generate_case["context"],
        "rows": rows,
    }


def measure_load_time(args: argparse.Namespace, config: ChatGLMConfig, folder: Path) -> dict:
    """Return the seconds until a saved checkpoint is ready, in fresh processes, files cached.

    With random weights the checkpoint is written into `folder` unless it is there.
    """
    reference = plan_own("", args, config, list_cases(args))
    settings = reference.settings
    if args.random_weights:
        shape = f"{config.num_layers}x{config.hidden_size}x{config.ffn_hidden_size}"
        checkpoint = folder / f"chatglm-{shape}-{reference.name.replace(' ', '')}"
        if not (checkpoint / "config.json").exists():
            show(f"writing {checkpoint}")
            with Worker("writing", reference.command) as worker:
                worker.ask("load", **settings | {"dtype": "float16"})
                worker.ask("save", folder=str(checkpoint))
        settings = settings | {"model": str(checkpoint), "random_weights": False}
    rounds = []
    for _ in range(1 + args.rounds):  # the first one brings the files into memory
        start = time.perf_counter()
        with Worker(reference.name, reference.command) as worker:
            load_s = worker.ask("load", **settings)["load_s"]
            rounds.append({"load_s": load_s, "process_s": time.perf_counter() - start})
    return {"checkpoint": reference.name, "rounds": rounds[1:]}


# Arguments, the whole.


def describe_machine(args: argparse.Namespace) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device, _ = loading.choose_device(args.device)
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": args.threads or torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure tokens/s, first token and memory.")
    utils.add_model_arguments(parser)
    default_model = parser.get_default("model")
    parser.set_defaults(model=None)
    parser.add_argument("--random-weights", action="store_true", help="of the 6B model's shape")
    parser.add_argument("--config", help="of random weights: a config.json, or its folder")
    parser.add_argument("--layers", type=utils.number(int, 1), help="of random weights")
    parser.add_argument(
        "--prompt-tokens",
        type=utils.number(int, 1),
        nargs="+",
        default=[512],
        metavar="N",
        help="of a prompt, or of several (default: 512)",
    )
    parser.add_argument(
        "--new-tokens", type=utils.number(int, 2), default=64, help="of an answer (default: 64)"
    )
    parser.add_argument(
        "--random-context",
        type=utils.number(int, 1),
        metavar="N",
        help="also generate behind N random keys and values, without computing a prompt of N",
    )
    parser.add_argument("--rounds", type=utils.number(int, 0), default=3, help="(default: 3)")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="ENGINE",
        help=f"{', '.join(OWN_ENGINES)}, also with flags in quotes ('int4 --exact-prefill'); "
        f"{', '.join(LLAMA_ENGINES)} (weights, output layer)",
    )
    parser.add_argument(
        "--llama-python",
        metavar="PYTHON",
        help="that has llama-cpp-python and gguf (default: this one)",
    )
    parser.add_argument("--original-tables", action="store_true", help="fill them, too")
    parser.add_argument("--load-time", action="store_true", help="also measure loading")
    parser.add_argument(
        "--folder", type=Path, help="for made GGUF files and checkpoints (default: temporary)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the report")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="show a report; no measuring"
    )
    args = parser.parse_args(argv)
    check_args(args)
    args.threads = args.threads or hardware.choose_threads()  # of all programs that are compared
    if not args.random_weights:
        args.model = args.model or default_model
    return args


def check_args(args: argparse.Namespace):
    """Refuse flags that would have no effect."""
    if args.num_gpus > 1 or args.offload_folder:
        raise SystemExit("--num-gpus and --offload-folder: what is measured is one device.")
    if args.random_weights and args.model:
        raise SystemExit(f"--model {args.model}: leave it or --random-weights out.")
    if args.random_weights and args.revision:
        raise SystemExit(f"--revision {args.revision} needs a model on the hub, by --model.")
    if args.random_weights and args.adapter:
        raise SystemExit(f"--adapter {args.adapter} needs the model it was trained on, by --model.")
    for name in ("config", "layers", "random_context"):
        if getattr(args, name) is not None and not args.random_weights:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"{flag} {getattr(args, name)} needs --random-weights.")
    if args.plot and find_spec("PIL") is None:
        raise SystemExit(f"--plot {args.plot} needs Pillow: pip install pillow")
    if not args.rounds and not args.original_tables and not args.from_json:
        raise SystemExit("--rounds 0 measures nothing: add --original-tables, or give 3.")
    if not args.rounds and (args.load_time or args.compare or args.plot):
        raise SystemExit("--rounds 0 allows no --compare, --load-time or --plot: give 3.")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    config = read_shape(args)
    report = {
        "model": args.model or "random weights",
        "shape": describe_shape(config),
        "machine": describe_machine(args),
        "rounds": args.rounds,
    }
    if args.rounds:
        device, _ = loading.choose_device(args.device)
        free = hardware.get_free_memory(device)
        free = None if free is None else free - READER_BYTES
        groups, left_out = group_engines(plan_engines(args, config, folder), free)
        measured = [measure_group(group, args, left_out) for group in groups]
        report |= summarize(measured) | {"left_out": left_out}
    if args.load_time:
        report["load_time"] = measure_load_time(args, config, folder)
    if args.original_tables:
        report["original_tables"] = measure_original_tables(args, config)
    return report


def read_report(file: Path) -> dict:
    try:
        report = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--from-json {file}: {one_line(error)}") from error
    if not isinstance(report, dict) or "machine" not in report:
        raise SystemExit(f"--from-json {file} is no report of this program.")
    return report


def main(argv=None):
    args = parse_args(argv)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.from_json:
            report = read_report(args.from_json)
        else:
            with nullcontext(args.folder) if args.folder else TemporaryDirectory() as folder:
                report = measure(args, Path(folder))
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
    main()
