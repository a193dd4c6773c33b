"""Measure a checkpoint on MMLU.

    python evaluate_mmlu.py --data DIR                  # zero-shot chain of thought
    python evaluate_mmlu.py --data DIR --mode base      # a base model: 5 examples, answer only

`--data` is the folder with {dev,test}/*.csv as its authors distribute it (no header, the answer a
letter), or with a header: columns in any order, the answer a letter or a number.
"""

import re
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
QUESTION, ANSWER = {"question", "input"}, {"answer", "target"}  # names of columns
OPTION = re.compile(r"(?:choice|option)?s?[\W_]*([a-d]|[0-4])")
# Anatomy is in STEM, as in lm-evaluation-harness; its authors have it among Others. Only so do the
# published categories, weighted by their questions, give the published averages.
CATEGORY = map_categories("MMLU")


def read_header(path: Path, header: list[str]) -> tuple[list[int], dict[str, str]]:
    """Return the columns of question, options and answer, and the letters of answers in numbers.

    A number is that in the name of an option, or else counted from 0.
    """
    names = [name.strip().lower() for name in header]
    options = [(match[1], i) for i, name in enumerate(names) if (match := OPTION.fullmatch(name))]
    keys, columns = zip(*sorted(options), strict=True) if options else ((), ())
    questions = [i for i, name in enumerate(names) if name in QUESTION]
    answers = [i for i, name in enumerate(names) if name in ANSWER]
    keys = "".join(keys)
    if keys not in ("abcd", "0123", "1234") or len(questions) != 1 or len(answers) != 1:
        raise SystemExit(
            f"{path}: the header is {','.join(header)}: it needs question, A, B, C, D (or choice0 "
            "to choice3) and answer, once each."
        )
    letters = dict(zip("0123" if keys == "abcd" else keys, LETTERS, strict=True))
    return [*questions, *columns, *answers], letters


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows: question, four options, the answer's letter."""
    rows = [row for row in reading.read_csv(path) if any(row)]
    columns, letters, width = [*range(6)], {}, 6
    if rows and all(
        {cell.strip().lower() for cell in rows[0]} & names for names in (QUESTION, ANSWER)
    ):
        header = rows.pop(0)
        (columns, letters), width = read_header(path, header), len(header)
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise SystemExit(
                f"{path}, row {number}: {len(row)} cells instead of {width}, with a question, 4 "
                f"options and an answer: {','.join(row)[:60]!r}."
            )
        answer = row[columns[-1]].strip().upper().removesuffix(".0")  # 2.0, as pandas writes it
        answer = letters.get(answer, answer)
        if answer not in tuple(LETTERS):
            raise SystemExit(
                f"{path}, row {number}: the answer is {row[columns[-1]]!r} and must be one of "
                f"{', '.join([*LETTERS, *letters])}."
            )
        rows[number - 1] = [*(row[i] for i in columns[:-1]), answer]
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
    core.utils.run_script(main)
