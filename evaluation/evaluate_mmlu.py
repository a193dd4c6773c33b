"""Measure a checkpoint on MMLU.

    python evaluate_mmlu.py --data DIR                  # zero-shot chain of thought
    python evaluate_mmlu.py --data DIR --mode base      # a base model: 5 examples, answer only

`--data` is the folder with {dev,test}/*.csv as its authors distribute it (no header, the answer a
letter), or with a header and the answer as a number.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import core
import reading
from reading import LETTERS, Item, map_categories

SOURCE = "get data.tar from https://github.com/hendrycks/test and unpack it"
HUB_NAME = "cais/mmlu"
EXTRACTION_PROMPT = "Therefore, among A through D, the answer is"
LEAD = "Answer: "
# Anatomy is in STEM, as in lm-evaluation-harness; its authors have it among Others. Only so do the
# published categories, weighted by their questions, give the published averages.
CATEGORY = map_categories("MMLU")


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows: question, four options, the answer's letter."""
    rows = [row for row in reading.read_csv(path) if row]
    if rows and rows[0][-1] == "answer":
        letters = dict(zip("0123", LETTERS, strict=True))
        rows = [[*row[:-1], letters.get(row[-1], "")] for row in rows[1:]]
    for number, row in enumerate(rows, start=1):
        if len(row) != 6 or row[-1] not in tuple(LETTERS):
            raise SystemExit(f"{path}, row {number}: not a question, 4 options and an answer.")
    return rows


def read_split(data: str, split: str) -> dict[str, list[list[str]]]:
    """Return the rows of each subject."""
    subjects = {}
    if data == HUB_NAME:
        for row in reading.load_hub(data, "all", split):
            rows = subjects.setdefault(row["subject"], [])
            rows.append([row["question"], *row["choices"], LETTERS[row["answer"]]])
        return subjects
    folder = reading.locate_data(data, SOURCE)
    folder = next((path for path in (folder, folder / "data") if (path / split).is_dir()), folder)
    for path in sorted((folder / split).glob(f"*_{split}.csv")):
        subjects[path.stem.removesuffix(f"_{split}")] = read_rows(path)
    if not subjects:
        raise SystemExit(f"{folder / split} has no *_{split}.csv: {SOURCE}.")
    return subjects


def read_items(data: str, split: str) -> list[Item]:
    subjects = read_split(data, split)
    if unknown := subjects.keys() - CATEGORY.keys():
        raise SystemExit(f"--data {data}: {', '.join(sorted(unknown))} are no subjects of MMLU.")
    items = []
    for subject, rows in subjects.items():
        for i, (question, *options, answer) in enumerate(rows):
            lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
            prompt = "\n".join([question.strip(), *lines])
            items.append(Item(subject, str(i), prompt, answer, CATEGORY[subject]))
    return items


def make_title(subject: str) -> str:
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}."


def load_items(args: Namespace) -> list[Item]:
    items = read_items(args.data, "test")
    if args.mode == "base":  # the prompts of MMLU's authors
        items = reading.add_examples(items, read_items(args.data, "dev"), make_title, LEAD)
    return items


BENCHMARK = core.Benchmark(
    name="mmlu",
    description=__doc__,
    data="MMLU",
    load_items=load_items,
    answer=partial(core.answer_choices, extraction_prompt=EXTRACTION_PROMPT, lead=LEAD),
    hub_name=HUB_NAME,
)
main = partial(core.main, BENCHMARK)

if __name__ == "__main__":
    main()
