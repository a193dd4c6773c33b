"""Examples from files of questions and answers, as the ids that the original trains on."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

from arguments import DataArguments
from datasets import Dataset

PROMPT, RESPONSE, HISTORY = "prompt", "response", "history"
IGNORED = -100  # a label without loss


def read_examples(path: str, arguments: DataArguments, limit: int | None) -> Dataset:
    """Return the questions, answers and histories of the first lines of a file.

    Raises:
        SystemExit: The file or a column is missing, a line is broken or no line is complete.
    """
    columns = {PROMPT: arguments.prompt_column, RESPONSE: arguments.response_column}
    if arguments.history_column:
        columns[HISTORY] = arguments.history_column
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [*find_reader(path)(path, file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or f"it cannot be read as UTF-8 ({error})"
        raise SystemExit(f"{path}: {problem}.") from error
    check_columns(path, columns, [row for _, row in rows])
    examples = [select(path, number, row, columns) for number, row in rows[:limit]]
    if not any(example[PROMPT] and example[RESPONSE] for example in examples):
        raise SystemExit(
            f"{path}: no example has both {columns[PROMPT]} and {columns[RESPONSE]}: add some."
        )
    return Dataset.from_list(examples)


def find_reader(path: str):
    readers = {".json": read_json_lines, ".jsonl": read_json_lines, ".csv": read_csv}
    if (suffix := Path(path).suffix.lower()) not in readers:
        raise SystemExit(f"{path}: the name must end with .json, .jsonl or .csv.")
    return readers[suffix]


def read_json_lines(path: str, file):
    """Yield number and content of the lines; a file may also hold one list of examples."""
    text = file.read()
    lines = enumerate(text.split("\n"), 1)
    if text.lstrip().startswith("["):
        lines = [(1 + text[: len(text) - len(text.lstrip())].count("\n"), text)]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: no JSON: {error}: mend the line.") from error
        yield from enumerate(content, 1) if isinstance(content, list) else [(number, content)]


def read_csv(path: str, file):
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def select(path: str, number: int, row: dict, columns: dict[str, str]) -> dict:
    """Return the columns of an example by our names.

    Raises:
        SystemExit: A value is of the wrong kind.
    """
    if not isinstance(row, dict):
        raise SystemExit(f"{path}, line {number}: {str(row)[:40]!r} is no object with columns.")
    example = {name: row.get(column) for name, column in columns.items()}
    for name in (PROMPT, RESPONSE):
        if not isinstance(example[name], str | None):
            raise SystemExit(
                f"{path}, line {number}: {columns[name]} must be a text, not {example[name]!r:.40}."
            )
    history = example.get(HISTORY)
    if history is not None and not (isinstance(history, list) and all(map(is_round, history))):
        raise SystemExit(
            f"{path}, line {number}: {columns[HISTORY]} must be a list of [question, answer], not "
            f"{history!r:.40}."
        )
    return example


def is_round(value) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(text, str) for text in value)


def check_columns(path: str, columns: dict[str, str], rows: list[dict]):
    found = {name for row in rows if isinstance(row, dict) for name in row if name is not None}
    if not rows:
        raise SystemExit(f"{path}: the file is empty: add examples.")
    if missing := [column for column in columns.values() if column not in found]:
        raise SystemExit(
            f"{path}: no column {missing[0]}: the columns are {', '.join(sorted(found))}."
        )


def iterate(batch: dict, tokenizer, prefix: str):
    """Yield prompts and answers of the complete examples of a batch."""
    histories = batch.get(HISTORY) or [None] * len(batch[PROMPT])
    for query, answer, history in zip(batch[PROMPT], batch[RESPONSE], histories, strict=True):
        if query and answer:
            yield prefix + tokenizer.build_prompt(query, history), answer


def prepare_training(batch: dict, tokenizer, arguments: DataArguments) -> dict:
    """Return ids and labels: prompt, answer and end, padded on the right to one length.

    As the original, a prompt that is too long loses its end, which is the question's.
    """
    inputs = {"input_ids": [], "labels": []}
    for prompt, answer in iterate(batch, tokenizer, arguments.source_prefix):
        prompt_ids = tokenizer.encode(
            prompt, truncation=True, max_length=arguments.max_source_length
        )
        answer_ids = tokenizer.encode(
            answer,
            add_special_tokens=False,
            truncation=True,
            max_length=arguments.max_target_length,
        )
        pad, ends = tokenizer.pad_token_id, [*answer_ids, tokenizer.eos_token_id]
        padding = [pad] * (arguments.max_length - len(prompt_ids) - len(ends))
        labels = [pad] * len(prompt_ids) + ends + padding
        if arguments.ignore_pad_token_for_loss:
            labels = [IGNORED if label == pad else label for label in labels]
        inputs["input_ids"].append(prompt_ids + ends + padding)
        inputs["labels"].append(labels)
    return inputs


def prepare_evaluation(batch: dict, tokenizer, arguments: DataArguments, max_target: int) -> dict:
    """Return the prompts, padded on the left, and the answers as labels.

    As the original, the labels begin with [gMASK] sop and have no end.
    """
    pairs = [*iterate(batch, tokenizer, arguments.source_prefix)]
    prompts, answers = ([*texts] for texts in zip(*pairs, strict=True)) if pairs else ([], [])
    if not pairs:
        return {name: [] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    inputs = tokenizer(
        prompts, max_length=arguments.max_source_length, truncation=True, padding=True
    )
    labels = tokenizer(answers, max_length=max_target, truncation=True)["input_ids"]
    if arguments.ignore_pad_token_for_loss:
        pad = tokenizer.pad_token_id
        labels = [[IGNORED if label == pad else label for label in row] for row in labels]
    return {**inputs, "labels": labels}


def create_dataset(purpose: str, arguments: DataArguments, tokenizer) -> Dataset:
    """Return the examples of a file as ids; `purpose` is train, eval or predict."""
    name = {"train": "train_file", "eval": "validation_file", "predict": "test_file"}[purpose]
    if (path := getattr(arguments, name)) is None:
        raise SystemExit(f"--do_{purpose} needs --{name}.")
    examples = read_examples(path, arguments, getattr(arguments, f"max_{purpose}_samples"))
    prepare = partial(prepare_training, tokenizer=tokenizer, arguments=arguments)
    if purpose != "train":
        target = {"eval": arguments.val_max_target_length, "predict": arguments.max_target_length}
        prepare = partial(
            prepare_evaluation, tokenizer=tokenizer, arguments=arguments, max_target=target[purpose]
        )
    dataset = examples.map(
        prepare,
        batched=True,
        num_proc=arguments.preprocessing_num_workers,
        remove_columns=examples.column_names,
        load_from_cache_file=not arguments.overwrite_cache,
        desc=f"Preprocessing {path}",
    )
    if skipped := len(examples) - len(dataset):
        print(f"{path}: {skipped} lines without a question or an answer.", file=sys.stderr)
    return dataset
