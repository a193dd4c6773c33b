"""What the evaluations share: options, batches, resuming, several processes, scores, tables.

A script makes a list of `Item` and hands `run` a function that predicts the answers of a batch.
`run` appends every finished item to a file, goes on from there when it is started again, and under
torchrun deals the batches out to the processes.
"""

import argparse
import csv
import errno
import hashlib
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import mean

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils  # noqa: E402
from chatglm2.command_line import number, one_line  # noqa: E402

LETTERS = "ABCD"
MAX_PROMPT_TOKENS = 2048  # of zero-shot prompts, as the original
MAX_NEW_TOKENS = 512  # as the original
CATEGORIES = ("STEM", "Social Sciences", "Humanities", "Others")  # in the order of the README
JOURNAL = "items.jsonl"
LOCK = "lock"
SPELLINGS = {"model", "revision", "adapter"}  # another name for the same weights will do


@dataclass(frozen=True)
class Item:
    subject: str
    id: str  # unique within the subject
    prompt: str  # without the chat format
    answer: str  # what a right prediction is equal to; "" if it is not published
    category: str = ""

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.id}"


def create_parser(description: str, data: str, hub_name: str | None = None):
    """Return a parser with the options of all benchmarks; `data` is the default of --data."""
    parser = argparse.ArgumentParser(description=description)
    utils.add_model_arguments(parser)
    by_name = f", or {hub_name} to load it from the hub" if hub_name else ""
    parser.add_argument(
        "--data", default=data, help=f"the benchmark's files (default: %(default)s){by_name}"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write to and resume from (default: results/...)"
    )
    parser.add_argument(
        "--mode",
        choices=["chat", "base"],
        default="chat",
        help="chat (default): prompts in the chat format; base: plain text for a base model",
    )
    positive = number(int, 1)
    parser.add_argument(
        "--limit", type=positive, help="only the first so many items of each subject"
    )
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="only these subjects")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="prompts at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--order",
        choices=["length", "file"],
        default="length",
        help="batches of prompts of like length, the longest first, or subject by subject "
        "(default: %(default)s)",
    )
    return parser


# Data.


def locate_data(name: str, source: str) -> Path:
    """Return the path `--data`, relative to the current folder or else to this one."""
    for path in (Path(name).expanduser(), HERE / name):
        try:
            if path.exists():
                return path
        except OSError as error:
            raise SystemExit(f"--data {name}: {error.strerror or error}.") from error
    raise SystemExit(f"--data {name}: there is no such file or folder: {source}.")


def load_hub(name: str, config: str, split: str):
    """Return a split of a data set on the hub, a sequence of dicts."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(f"--data {name} needs a package: pip install datasets") from error
    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data {name} ({config}): {one_line(error)}") from error


def read_file(path: Path, parse, remedy="download it again", newline=None):
    """Return what `parse` makes of a text file in UTF-8, opened."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return parse(file)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror or error}.") from error
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path} is damaged ({one_line(error)}): {remedy}.") from error


def read_text(path: Path) -> str:
    return read_file(path, lambda file: file.read(), "it must be a text in UTF-8")


def read_csv(path: Path, reader=csv.reader) -> list:
    return read_file(path, lambda file: list(reader(file)), newline="")


def read_json(path: Path):
    return read_file(path, json.load)


def read_json_lines(path: Path, **remedy) -> list:
    def parse(file) -> list:
        return [json.loads(line) for line in file if line.strip()]

    return read_file(path, parse, newline="\n", **remedy)


def check_fields(path: Path, rows: list, **types):
    """Check that each row is a dict with fields of these types."""
    for place, row in enumerate(rows, start=1):
        fields = row if isinstance(row, dict) else {}
        if missing := [name for name in types if not isinstance(fields.get(name), types[name])]:
            raise SystemExit(
                f"{path}, item {place}: there is no {', '.join(missing)}; is it another benchmark?"
            )


def select(items: list[Item], subjects: list[str] | None, limit: int | None) -> list[Item]:
    """Return the items of `--subjects`, at most `--limit` of each."""
    if not items:
        raise SystemExit("--data: the files are empty.")
    for key, count in Counter(item.key for item in items).items():
        if count > 1:
            raise SystemExit(f"--data: item {key} is there {count} times: keep one of them.")
    known = {item.subject for item in items}
    if unknown := set(subjects or ()) - known:
        raise SystemExit(
            f"--subjects {' '.join(sorted(unknown))}: the data has {', '.join(sorted(known))}."
        )
    counts, selected = defaultdict(int), []
    for item in items:
        counts[item.subject] += 1
        if (not subjects or item.subject in subjects) and counts[item.subject] <= (limit or 1e9):
            selected.append(item)
    return selected


# The model.


def encode(model, tokenizer, prompts: list[str], **truncation):
    return tokenizer(prompts, padding=True, return_tensors="pt", **truncation).to(model.device)


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[str], stop: str | None = None, **truncation):
    """Return the greedy continuations of a batch of prompts, each cut before the text `stop`."""
    inputs = encode(model, tokenizer, prompts, **truncation)
    stopping = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    outputs = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **stopping)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :].tolist())
    return [text.partition(stop)[0] for text in texts] if stop else texts


def continue_examples(model, tokenizer, mode: str, items: list[Item], stop: str) -> list[str]:
    """Return what follows few-shot prompts; in chat mode each is the question of a round."""
    prompts = [item.prompt for item in items]
    if mode == "chat":
        prompts = [tokenizer.build_prompt(prompt) for prompt in prompts]
    return generate(model, tokenizer, prompts, stop=stop)


@torch.inference_mode()
def choose(model, tokenizer, prompts: list[str], lead: str = "", **truncation) -> list[str]:
    """Return for each prompt the letter A, B, C or D that is likeliest to be its next token.

    Args:
        lead: What stands in front of the letter; some tokenizers have several tokens for one.
    """
    letter_ids = [tokenizer.encode(lead + c, add_special_tokens=False)[-1] for c in LETTERS]
    inputs = encode(model, tokenizer, prompts, **truncation)
    logits = model(**inputs, return_last_logit=True).logits[:, -1, letter_ids]
    return [LETTERS[i] for i in logits.argmax(dim=-1).tolist()]


def reason_and_choose(model, tokenizer, questions: list[str], extraction_prompt: str):
    """Answer multiple-choice questions as the original's C-Eval script: zero-shot chain of thought.

    The model reasons; then question, reasoning and `extraction_prompt` are one new question, and of
    the first token of its answer the likeliest letter counts. Both prompts are cut to 2048 tokens.
    """
    truncation = {"truncation": True, "max_length": MAX_PROMPT_TOKENS}
    prompts = [tokenizer.build_prompt(question) for question in questions]
    reasonings = generate(model, tokenizer, prompts, **truncation)
    prompts = [
        tokenizer.build_prompt(f"{question}{reasoning}\n{extraction_prompt}")
        for question, reasoning in zip(questions, reasonings, strict=True)
    ]
    letters = choose(model, tokenizer, prompts, **truncation)
    return [
        {"prediction": letter, "output": reasoning}
        for letter, reasoning in zip(letters, reasonings, strict=True)
    ]


# Running.


def start_processes(args):
    """Join the other processes; on GPUs, give each one of its own."""
    use_cpu = args.device in ("cpu", "mps") or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    if state.num_processes > 1 and args.num_gpus > 1:
        raise SystemExit(
            f"--num-gpus {args.num_gpus}: each of {state.num_processes} processes takes a GPU of "
            "its own: leave it out, or start one process."
        )
    if state.num_processes > 1 and not use_cpu:
        if args.device not in ("auto", "cuda"):
            raise SystemExit(
                f"--device {args.device}: each of {state.num_processes} processes takes a GPU of "
                "its own: leave it out."
            )
        args.device = f"cuda:{state.local_process_index}"


def load_model(args):
    """As `utils.load_model`, in each of the processes that torchrun started, if it did."""
    start_processes(args)
    return utils.load_model(args)


def make_batches(items: list[Item], lengths: dict[str, int], size: int, order: str):
    """Return lists of at most `size` items: of like length, or of one subject in its order."""
    if order == "length":
        groups = [sorted(items, key=lambda item: -lengths[item.key])]
    else:
        groups = [list(group) for _, group in groupby(items, lambda item: item.subject)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@contextmanager
def hold(folder: Path):
    """Make the folder and keep other runs out of it until this one ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise SystemExit(f"--output {folder}: {error.strerror or error}.") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(
                f"--output {folder}: another run is writing there: wait for its end, or name "
                "another --output."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise SystemExit(f"--output {folder}: {error.strerror or error}.") from error
        yield


def open_journal(folder: Path, settings: dict) -> dict[str, dict]:
    """Return the finished records of `items.jsonl` by key; begin the file if there is none.

    A line that was cut off when the process was killed is removed from the file.

    Raises:
        SystemExit: The file is of a run with other settings.
    """
    path = folder / JOURNAL
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
    for name in settings:
        if name not in SPELLINGS and settings.get(name) != found.get(name):
            raise SystemExit(
                f"{path} is of a run with {name} {found.get(name)!r}, now it is "
                f"{settings.get(name)!r}: name another --output, or remove that folder."
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


def locate_output(benchmark: str, model, args) -> Path:
    precision = utils.name_precision(model).replace(" with ", "-").replace(" weights", "").lower()
    precision = precision.replace(", ", "-").replace(" ", "-")
    name = f"{benchmark}-{name_model(args.model, args.adapter)}-{args.mode}-{precision}"
    return args.output or Path("results", name)


def predict_batch(predict, batch: list[Item]) -> list[dict]:
    records = []
    for item, outcome in zip(batch, predict(batch), strict=True):
        is_correct = outcome["prediction"] == item.answer if item.answer else None
        records.append({"key": item.key, **outcome, "answer": item.answer, "correct": is_correct})
    return records


def predict_all(state: PartialState, predict, batches, folder: Path, done: dict[str, dict]):
    """Run all batches with an item that is not in `done`, and add each new record there.

    Batches are computed whole, also after an interruption, so that it changes no result; the first
    process alone writes.
    """
    selected = {item.key for batch in batches for item in batch}
    batches = [batch for batch in batches if any(item.key not in done for item in batch)]
    size = state.num_processes
    with tqdm(total=sum(map(len, batches)), disable=not state.is_main_process) as bar:
        for start in range(0, len(batches), size):
            with state.split_between_processes(batches[start : start + size]) as own:
                records = [record for batch in own for record in predict_batch(predict, batch)]
            records = gather_object(records)
            new = [record for record in records if record["key"] not in done]
            if state.is_main_process:
                append(folder / JOURNAL, new)
            done.update((record["key"], record) for record in new)
            bar.update(len(records))
            scores = [record["correct"] for key, record in done.items() if key in selected]
            if None not in scores:
                bar.set_postfix_str(f"accuracy {100 * mean(scores):.2f}%")


def plan_batches(items: list[Item], model, tokenizer, args) -> list[list[Item]]:
    lengths = {item.key: len(tokenizer.encode(item.prompt)) for item in items}
    num_long = sum(length > model.config.seq_length for length in lengths.values())
    if num_long and PartialState().is_main_process:
        context = f"the model's context of {model.config.seq_length} tokens"
        print(f"warning: {num_long} prompts are longer than {context}", file=sys.stderr)
    return make_batches(items, lengths, args.batch_size, args.order)


def describe_run(benchmark: str, all_items: list[Item], model, args) -> dict:
    """Return what has to stay the same for an interrupted run to go on."""
    weights, data = hashlib.sha256(), hashlib.sha256()
    for parameter in model.parameters():
        # of quantized layers the scales only: on a CPU their weights have no data
        if parameter.is_floating_point() and not parameter.is_meta:
            weights.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    data.update(json.dumps([astuple(item) for item in all_items]).encode())
    return {
        "benchmark": benchmark,
        "mode": args.mode,
        "model": args.model,
        "revision": args.revision,
        "adapter": args.adapter,
        "precision": utils.name_precision(model),
        "exact_prefill": args.exact_prefill,
        "kv_cache_dtype": args.kv_cache_dtype,
        "weights": weights.hexdigest()[:16],  # of the first values of each floating-point tensor
        "data": data.hexdigest()[:16],
    }


def run(
    benchmark: str,
    items: list[Item],
    all_items: list[Item],
    predict,
    model,
    tokenizer,
    args,
    **scoring,
):
    """Predict `items`, going on from an interrupted run; write the results and print the table.

    Args:
        benchmark: Its name and split, such as "ceval-val".
        all_items: The whole data, of which `items` are selected: a run of some can be continued by
            a run of more.
        predict: Takes a list of items, returns a dict with "prediction" and "output" for each.
        scoring: Further arguments of `score`.

    Returns:
        The results as written, and the record of each item.
    """
    state, folder = PartialState(), locate_output(benchmark, model, args)
    settings = describe_run(benchmark, all_items, model, args)
    start = time.perf_counter()
    with hold(folder) if state.is_main_process else nullcontext():
        done = load_done(state, folder, settings)
        batches = plan_batches(items, model, tokenizer, args)
        predict_rest(state, predict, batches, folder, done, args.batch_size)
        records = [done[item.key] for item in items]
        results = {
            **settings,
            **score(items, records, **scoring),
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
            report(folder, results)
    state.destroy_process_group()
    return results, records


def load_done(state: PartialState, folder: Path, settings: dict) -> dict[str, dict]:
    """Return the finished records, in each process."""
    try:
        journal = [open_journal(folder, settings) if state.is_main_process else None]
    except OSError as error:
        raise SystemExit(f"--output {folder}: {error.strerror or error}.") from error
    return broadcast_object_list(journal)[0]


def predict_rest(state: PartialState, predict, batches, folder: Path, done: dict, batch_size: int):
    """As `predict_all`; whatever ends it, say what is kept."""
    try:
        predict_all(state, predict, batches, folder, done)
    except KeyboardInterrupt as error:
        raise SystemExit(
            f"interrupted; {len(done)} items are in {folder}: the same command goes on from there."
        ) from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"out of memory; {len(done)} items are in {folder}: the same command with a "
            f"--batch-size smaller than {batch_size} goes on from there."
        ) from error
    except OSError as error:
        raise SystemExit(
            f"{error.strerror or one_line(error)}; {len(done)} items are in {folder}: the "
            "same command goes on from there."
        ) from error


# Results.


def score(items: list[Item], records: list[dict], weigh_subjects_equally=False) -> dict:
    """Return the accuracies in percent: in all, of each category and each subject.

    All is the share of right answers, or else the mean of the subjects' shares.
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


def format_table(results: dict) -> str:
    """Return the results as a row of the README's table."""
    categories = results["categories"]
    names = [name for name in CATEGORIES if name in categories]
    cells = [name_model(results["model"], results.get("adapter")), f"{results['accuracy']:.2f}"]
    cells += [f"{categories[name]:.2f}" for name in names]
    header = ["Model", "Average" if names else "Accuracy", *names]
    rows = [header, ["---"] * len(header), cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_text(path: Path, text: str):
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise SystemExit(
            f"{path}: {error.strerror or error}; the finished items are in {path.parent}: the same "
            "command goes on from there."
        ) from error


def report(folder: Path, results: dict):
    """Write `results.json` and `results.md` into the folder, and print the table."""
    text = json.dumps(results, ensure_ascii=False, indent=2)
    write_text(folder / "results.json", text + "\n")
    if "accuracy" in results:
        table = format_table(results)
        write_text(folder / "results.md", table + "\n")
        print(table)
    print(f"{results['num_items']} items: {folder}", file=sys.stderr)
