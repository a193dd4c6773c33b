"""The program behind the four benchmarks: flags, batches, resuming, several processes, scores.

A script describes its benchmark in one `Benchmark` record and calls `main`. `main` appends each
finished item to a file and continues from there when it is started again. Under torchrun it divides
the batches among the processes.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from reading import (  # also makes utils and chatglm2 importable
    LETTERS,
    Item,
    exit_in_one_line,
    read_json_lines,
    select,
)
from tables import format_table
from tqdm import tqdm

import utils
from chatglm2.errors import one_line
from chatglm2.loading import name_precision
from chatglm2.sampling_chatglm import own_settings

MAX_PROMPT_TOKENS = 2048  # of zero-shot prompts, as the original
MAX_NEW_TOKENS = 512  # as the original
CATEGORIES = ("STEM", "Social Sciences", "Humanities", "Others")  # in the order of the README
JOURNAL = "items.jsonl"
NAMES_OF_WEIGHTS = {"model", "revision", "adapter"}  # may change if the weights are the same


@dataclass(frozen=True)
class Benchmark:
    """What distinguishes one benchmark from another.

    Attributes:
        name: Begins the name of the default --output; {fields} are filled in from the arguments.
        description: For --help; the first line is used.
        data: Default of --data.
        load_items: Takes the arguments and returns all items of the data.
        answer: Takes model, tokenizer, --mode and a batch of items; returns for each item a dict
            with "prediction" and "output".
        hub_name: Value of --data that loads the data from the hub.
        add_arguments: Takes the parser and adds the benchmark's own flags.
        finish: Takes arguments, folder, items and their records; writes more files.
        weigh_subjects_equally: The total is the mean of the subjects' accuracies.
    """

    name: str
    description: str
    data: str
    load_items: Callable[[argparse.Namespace], list[Item]]
    answer: Callable[..., list[dict]]
    hub_name: str | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    finish: Callable[..., None] | None = None
    weigh_subjects_equally: bool = False


def main(benchmark: Benchmark, argv: list[str] | None = None):
    args = parse_args(benchmark, argv)
    items = benchmark.load_items(args)
    selected = select(items, args.subjects, args.limit)
    start_processes(args)
    tokenizer, model = utils.load_model(args)
    run(benchmark, selected, items, model, tokenizer, args)


def parse_args(benchmark: Benchmark, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=benchmark.description.partition("\n")[0])
    utils.add_model_arguments(parser)
    by_name = f", or {benchmark.hub_name} to load it from the hub" if benchmark.hub_name else ""
    parser.add_argument(
        "--data",
        default=benchmark.data,
        help=f"the benchmark's files (default: %(default)s){by_name}",
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write to and resume from (default: results/...)"
    )
    parser.add_argument(
        "--mode",
        choices=["chat", "base"],
        default="chat",
        help="chat: prompts in the chat format; base: plain text for a base model "
        "(default: %(default)s)",
    )
    positive = utils.number(int, 1)
    parser.add_argument("--limit", type=positive, help="only the first LIMIT items of each subject")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="only these subjects")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--order",
        choices=["length", "file"],
        default="length",
        help="length: batches of prompts of similar length, the longest first; file: subject by "
        "subject (default: %(default)s)",
    )
    if benchmark.add_arguments:
        benchmark.add_arguments(parser)
    return parser.parse_args(argv)


# Answering.


def encode(model, tokenizer, prompts: list[str], **truncation):
    """Return a batch, padded on the left with a mask, whatever the checkpoint's files say."""
    padding = {"padding": True, "padding_side": "left", "return_attention_mask": True}
    return tokenizer(prompts, return_tensors="pt", **padding, **truncation).to(model.device)


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[str], stop: str | None = None, **truncation):
    """Return the greedy continuations of a batch of prompts, each cut before the text `stop`."""
    inputs = encode(model, tokenizer, prompts, **truncation)
    settings = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "tokenizer": tokenizer}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "stop_strings": [stop] if stop else None}
    outputs = model.generate(**inputs, **own_settings(model.generation_config, **settings))
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :].tolist())
    return [text.partition(stop)[0] for text in texts] if stop else texts


def answer_few_shot(
    model, tokenizer, mode: str, items: list[Item], stop: str, extract: Callable[[str, Item], str]
) -> list[dict]:
    """Answer prompts that begin with worked examples; in chat mode each is one question.

    Args:
        stop: A base model continues with another question, which begins with this text.
        extract: Takes the model's text and the item, and returns the prediction.
    """
    prompts = [item.prompt for item in items]
    if mode == "chat":
        prompts = [tokenizer.build_prompt(prompt) for prompt in prompts]
    return [
        {"prediction": extract(output, item), "output": output}
        for item, output in zip(items, generate(model, tokenizer, prompts, stop=stop), strict=True)
    ]


def answer_choices(
    model, tokenizer, mode: str, items: list[Item], extraction_prompt: str, lead: str
) -> list[dict]:
    """Answer multiple-choice questions.

    A base model continues few-shot prompts, which end with `lead`, with a letter. In chat mode the
    steps are those of the original's C-Eval script: the model reasons; then question, reasoning and
    `extraction_prompt` are one new question, and the likeliest letter is the answer. Both prompts
    are cut to 2048 tokens.
    """
    prompts = [item.prompt for item in items]
    if mode == "base":
        letters, outputs = choose(model, tokenizer, prompts, lead), [""] * len(items)
    else:
        truncation = {"truncation": True, "max_length": MAX_PROMPT_TOKENS}
        questions = [tokenizer.build_prompt(prompt) for prompt in prompts]
        outputs = generate(model, tokenizer, questions, **truncation)
        questions = [
            tokenizer.build_prompt(f"{prompt}{output}\n{extraction_prompt}")
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        letters = choose(model, tokenizer, questions, **truncation)
    return [
        {"prediction": letter, "output": output}
        for letter, output in zip(letters, outputs, strict=True)
    ]


@torch.inference_mode()
def choose(model, tokenizer, prompts: list[str], lead: str = "", **truncation) -> list[str]:
    """Return for each prompt the letter A, B, C or D that is likeliest to be its next token.

    Args:
        lead: Text in front of the letter; some tokenizers have several tokens for one letter.
    """
    letter_ids = [tokenizer.encode(lead + c, add_special_tokens=False)[-1] for c in LETTERS]
    inputs = encode(model, tokenizer, prompts, **truncation)
    logits = model(**inputs, return_last_logit=True, return_dict=True).logits[:, -1, letter_ids]
    return [LETTERS[i] for i in logits.argmax(dim=-1).tolist()]


# Running.


def start_processes(args: argparse.Namespace):
    """Join the processes that torchrun started, if it did; each takes a GPU of its own."""
    use_cpu = args.device in ("cpu", "mps") or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    if state.num_processes == 1:
        return
    flag = f"--num-gpus {args.num_gpus}" if args.num_gpus > 1 else f"--device {args.device}"
    if args.num_gpus > 1 or (not use_cpu and args.device not in ("auto", "cuda")):
        raise SystemExit(
            f"{flag}: each of {state.num_processes} processes takes a GPU of its own: leave it out."
        )
    if not use_cpu:
        args.device = f"cuda:{state.local_process_index}"


def plan_batches(items: list[Item], model, tokenizer, args: argparse.Namespace) -> list[list[Item]]:
    """Return batches of prompts of similar length, or of one subject in its order."""
    lengths = {item.key: len(tokenizer.encode(item.prompt)) for item in items}
    num_long = sum(length > model.config.seq_length for length in lengths.values())
    if num_long and PartialState().is_main_process:
        context = f"the model's context of {model.config.seq_length} tokens"
        print(f"warning: {num_long} prompts are longer than {context}", file=sys.stderr)
    groups = [list(group) for _, group in groupby(items, lambda item: item.subject)]
    if args.order == "length":
        groups = [sorted(items, key=lambda item: -lengths[item.key])]
    size = args.batch_size
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@contextmanager
def hold(folder: Path):
    """Make the folder and keep other runs out of it until this one ends, however it ends."""
    with exit_in_one_line(f"--output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / "lock").acquire(timeout=0)
        except Timeout as error:
            raise SystemExit(
                f"--output {folder}: another run is writing there: wait for its end, or name "
                "another --output."
            ) from error
    with lock:
        yield


def open_journal(folder: Path, settings: dict) -> dict[str, dict]:
    """Return the finished records of `items.jsonl` by key; begin the file if there is none.

    A line that was cut off when the process was killed is removed from the file.

    Raises:
        SystemExit: The file belongs to a run with other settings.
    """
    path = folder / JOURNAL
    with exit_in_one_line(f"--output {folder}"):
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        if not whole:
            append(path, [settings])
            return {}
    found, *records = read_json_lines(path, remedy=f"remove {folder}") or [None]
    foreign = not isinstance(found, dict) or "benchmark" not in found
    if foreign or not all(isinstance(r, dict) and {"key", "correct"} <= r.keys() for r in records):
        raise SystemExit(f"{path} is not of an evaluation: name another --output, or remove it.")
    for name in settings.keys() - NAMES_OF_WEIGHTS:
        if settings[name] != found.get(name):
            raise SystemExit(
                f"{path} is of a run with {name} {found.get(name)!r}, now it is "
                f"{settings[name]!r}: name another --output, or remove that folder."
            )
    return {record["key"]: record for record in records}


def append(path: Path, records: list[dict]):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(lines.encode())


def name_model(model: str, adapter: str | None = None) -> str:
    """Return the last part of a checkpoint's path, and of its adapter's."""
    paths = [Path(path).expanduser() for path in (model, adapter) if path]
    return "+".join((path.resolve() if path.is_dir() else path).name for path in paths)


def locate_output(benchmark: str, model, args: argparse.Namespace) -> Path:
    precision = name_precision(model).replace(" with ", "-").replace(" weights", "").lower()
    precision = precision.replace(", ", "-").replace(" ", "-")
    name = f"{benchmark}-{name_model(args.model, args.adapter)}-{args.mode}-{precision}"
    return args.output or Path("results", name)


def describe_run(benchmark: str, all_items: list[Item], model, args: argparse.Namespace) -> dict:
    """Return what has to stay the same for an interrupted run to be continued."""
    weights, data = hashlib.sha256(), hashlib.sha256()
    for parameter in model.parameters():
        # only the scales of quantized layers: on a CPU their weights have no data
        if parameter.is_floating_point() and not parameter.is_meta:
            weights.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    data.update(json.dumps([astuple(item) for item in all_items]).encode())
    return {
        "benchmark": benchmark,
        "mode": args.mode,
        "model": args.model,
        "revision": args.revision,
        "adapter": args.adapter,
        "precision": name_precision(model),
        "kv_cache_dtype": args.kv_cache_dtype,
        "weights": weights.hexdigest()[:16],  # of the first values of each floating-point tensor
        "data": data.hexdigest()[:16],
    }


def answer_missing(answer, batches: list[list[Item]], folder: Path, done: dict[str, dict]):
    """Answer the batches with an item that is not in `done`, and add the new records there.

    The records are also appended to the journal, by the first process. A batch is always computed
    whole, so that an interruption changes no result.

    Args:
        answer: Takes a batch, returns what `Benchmark.answer` does.
    """
    state, selected = PartialState(), {item.key for batch in batches for item in batch}
    batches = [batch for batch in batches if any(item.key not in done for item in batch)]
    size = state.num_processes
    with tqdm(total=sum(map(len, batches)), disable=not state.is_main_process) as bar:
        for start in range(0, len(batches), size):
            records = []
            with state.split_between_processes(batches[start : start + size]) as own:
                for batch in own:
                    for item, outcome in zip(batch, answer(batch), strict=True):
                        is_correct = outcome["prediction"] == item.answer if item.answer else None
                        record = {"key": item.key, **outcome, "answer": item.answer}
                        records.append(record | {"correct": is_correct})
            records = gather_object(records)
            new = {record["key"]: record for record in records if record["key"] not in done}
            if state.is_main_process:
                append(folder / JOURNAL, list(new.values()))
            done.update(new)
            bar.update(len(records))
            scores = [record["correct"] for key, record in done.items() if key in selected]
            if None not in scores:
                bar.set_postfix_str(f"accuracy {100 * mean(scores):.2f}%")


@contextmanager
def explain_end(folder: Path, done: dict[str, dict], batch_size: int):
    """End the program with one line if the block is interrupted, out of memory, or cannot write."""
    command = "the same command"
    try:
        yield
        return
    except KeyboardInterrupt:
        reason = "interrupted"
    except torch.OutOfMemoryError:
        reason = "out of memory"
        command += f" with a --batch-size smaller than {batch_size}"
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or one_line(error)}"
    raise SystemExit(f"{reason}; {len(done)} items are in {folder}: {command} goes on from there.")


def run(
    benchmark: Benchmark,
    items: list[Item],
    all_items: list[Item],
    model,
    tokenizer,
    args: argparse.Namespace,
) -> dict:
    """Answer `items`, continuing an interrupted run; write, print and return the results.

    Args:
        all_items: The whole data, from which `items` are selected: a run of some items can be
            continued by a run of more.
    """
    state, name = PartialState(), benchmark.name.format(**vars(args))
    folder, settings = locate_output(name, model, args), describe_run(name, all_items, model, args)
    answer, start = partial(benchmark.answer, model, tokenizer, args.mode), time.perf_counter()
    with hold(folder) if state.is_main_process else nullcontext():
        journal = [open_journal(folder, settings) if state.is_main_process else None]
        done = broadcast_object_list(journal)[0]
        with explain_end(folder, done, args.batch_size):
            answer_missing(answer, plan_batches(items, model, tokenizer, args), folder, done)
            records = [done[item.key] for item in items]
            results = {
                **settings,
                **score(items, records, benchmark.weigh_subjects_equally),
                "batch_size": args.batch_size,
                "processes": state.num_processes,
                "device": str(model.device),
                "seconds": round(time.perf_counter() - start, 1),  # of this run
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            if state.is_main_process:
                write_results(folder, results)
                if benchmark.finish:
                    benchmark.finish(args, folder, items, records)
    state.destroy_process_group()
    return results


# Results.


def score(items: list[Item], records: list[dict], weigh_subjects_equally=False) -> dict:
    """Return the accuracies in percent: in total, and of each category and subject.

    The total is the share of right answers, or else the mean of the subjects' shares.
    """
    by_subject, by_category = defaultdict(list), defaultdict(list)
    for item, record in zip(items, records, strict=True):
        by_subject[item.subject].append(record["correct"])
        if item.category:
            by_category[item.category].append(record["correct"])
    results = {"num_items": len(items)}
    if any(record["correct"] is None for record in records):
        return results
    subjects = {name: 100 * mean(scores) for name, scores in by_subject.items()}
    total = 100 * mean(record["correct"] for record in records)
    if weigh_subjects_equally:
        total = mean(subjects.values())
    categories = {name: 100 * mean(scores) for name, scores in by_category.items()}
    return {**results, "accuracy": total, "categories": categories, "subjects": subjects}


def format_results(results: dict) -> str:
    """Return the results as a row of the README's table."""
    categories = results["categories"]
    names = [name for name in CATEGORIES if name in categories]
    cells = [name_model(results["model"], results.get("adapter")), f"{results['accuracy']:.2f}"]
    cells += [f"{categories[name]:.2f}" for name in names]
    return format_table(["Model", "Average" if names else "Accuracy", *names], [cells])


def write_results(folder: Path, results: dict):
    """Write `results.json` and `results.md` into the folder, and print the table."""
    text = json.dumps(results, ensure_ascii=False, indent=2)
    (folder / "results.json").write_text(text + "\n", "utf-8")
    if "accuracy" in results:
        table = format_results(results)
        (folder / "results.md").write_text(table + "\n", "utf-8")
        print(table)
    print(f"{results['num_items']} items: {folder}", file=sys.stderr)
