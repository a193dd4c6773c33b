"""Measure a checkpoint on C-Eval, as the original's script did.

    python evaluate_ceval.py                            # ./CEval/val, zero-shot chain of thought
    python evaluate_ceval.py --split test               # writes submission.json for the website
    python evaluate_ceval.py --mode base --data DIR     # a base model: 5 examples, answer only

`--data` is the processed data ({val,test}/*/*.jsonl) or the official one ({dev,val,test}/*.csv).
"""

import csv
import json
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import core
import reading
from reading import LETTERS, SUBJECTS, Item, map_categories

SOURCE = (
    "get the processed data from https://cloud.tsinghua.edu.cn/f/e84444333b6d434ea7b0 (unpacked, "
    "it is the folder CEval), or the official csv files (https://github.com/hkust-nlp/ceval)"
)
HUB_NAME = "ceval/ceval-exam"
EXTRACTION_PROMPT = "综上所述，ABCD中正确的选项是："
LEAD = "答案："
CATEGORY = map_categories("C-Eval")
CHINESE_NAME = {key: name for group in SUBJECTS["C-Eval"].values() for key, name in group.items()}


def check_answer(path: Path, number: int, answer: str):
    if answer not in ("", *LETTERS):
        raise SystemExit(f"{path}, item {number}: the answer {answer!r} is not A, B, C or D.")


def make_item(subject: str, row: dict) -> Item:
    """Return the item of a row of the official csv; the test set has no answers."""
    question = row["question"] + "".join(f"\n{letter}. {row[letter]}" for letter in LETTERS)
    answer = row.get("answer") or ""
    return Item(subject, str(int(row["id"])), question, answer, CATEGORY[subject])


def read_official(path: Path, subject: str) -> list[Item]:
    rows = reading.read_csv(path, csv.DictReader)
    reading.check_fields(path, rows, id=str, question=str, **dict.fromkeys(LETTERS, str))
    for number, row in enumerate(rows, start=1):
        if not row["id"].isdecimal():
            raise SystemExit(f"{path}, item {number}: the id {row['id']!r} is not a number.")
        check_answer(path, number, row.get("answer") or "")
    return [make_item(subject, row) for row in rows]


def read_processed(path: Path, subject: str) -> list[Item]:
    rows, items = reading.read_json_lines(path), []
    types = {"inputs_pretokenized": str, "targets_pretokenized": list}
    reading.check_fields(path, rows, id=(int, str), **types)
    for number, row in enumerate(rows, start=1):
        answer = "".join(map(str, row["targets_pretokenized"]))
        check_answer(path, number, answer)
        question = row["inputs_pretokenized"]
        items.append(Item(subject, str(row["id"]), question, answer, CATEGORY[subject]))
    return items


def read_items(data: str, split: str) -> list[Item]:
    """Return all items of a split, from any form of `--data`."""
    if data == HUB_NAME:
        return [make_item(s, row) for s in CATEGORY for row in reading.load_hub(data, s, split)]
    folder, files = reading.locate_data(data, SOURCE) / split, {}
    for path in sorted([*folder.glob("**/*.jsonl"), *folder.glob(f"*_{split}.csv")]):
        subject = path.stem.removesuffix(f"_{split}") if path.suffix == ".csv" else path.stem
        if subject in files:
            raise SystemExit(f"{path}: there is another file of {subject}: keep one of them.")
        files[subject] = path
    if not files:
        raise SystemExit(f"{folder} has neither */*.jsonl nor *_{split}.csv: {SOURCE}.")
    if unknown := files.keys() - CATEGORY.keys():
        raise SystemExit(f"{folder}: {', '.join(sorted(unknown))} are no subjects of C-Eval.")
    items = []
    for subject, path in files.items():
        items += (read_official if path.suffix == ".csv" else read_processed)(path, subject)
    return items


def make_title(subject: str) -> str:
    return f"以下是中国关于{CHINESE_NAME[subject]}考试的单项选择题，请选出其中的正确答案。"


def load_items(args: Namespace) -> list[Item]:
    items = read_items(args.data, args.split)
    for item in items:
        if args.split == "val" and not item.answer:
            raise SystemExit(
                f"--split val: item {item.id} of {item.subject} has no answer; is it a test set?"
            )
    if args.mode == "base":  # the prompts of C-Eval's authors
        if args.data != HUB_NAME and not (reading.locate_data(args.data, SOURCE) / "dev").is_dir():
            raise SystemExit(
                f"--mode base: {args.data} has no folder dev with examples; the official csv files "
                "have it: https://github.com/hkust-nlp/ceval."
            )
        items = reading.add_examples(items, read_items(args.data, "dev"), make_title, LEAD)
    return items


def write_submission(args: Namespace, folder: Path, items: list[Item], records: list[dict]):
    """Write the file for cevalbenchmark.com: {subject: {id: letter}}."""
    if args.split != "test":
        return
    letters = {item.subject: {} for item in items}
    for item, record in zip(items, records, strict=True):
        letters[item.subject][item.id] = record["prediction"]
    path = folder / "submission.json"
    path.write_text(json.dumps(letters, indent=1) + "\n", "utf-8")
    print(f"submission: {path}")


def add_arguments(parser: ArgumentParser):
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        default="val",
        help="val: compute the accuracy; test: write submission.json (default: %(default)s)",
    )
    parser.set_defaults(order="file")  # the original's batches


BENCHMARK = core.Benchmark(
    name="ceval-{split}",
    description=__doc__,
    data="CEval",
    load_items=load_items,
    answer=partial(core.answer_choices, extraction_prompt=EXTRACTION_PROMPT, lead=LEAD),
    hub_name=HUB_NAME,
    add_arguments=add_arguments,
    finish=write_submission,
)
main = partial(core.main, BENCHMARK)

if __name__ == "__main__":
    core.utils.run_script(main)
