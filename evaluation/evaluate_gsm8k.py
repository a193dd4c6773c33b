"""Measure a checkpoint on GSM8K, with 8 worked examples (few-shot chain of thought).

    python evaluate_gsm8k.py --data test.jsonl
    python evaluate_gsm8k.py --data test.jsonl --mode base          # a base model

The examples in `gsm8k_cot.txt` are from the appendix of arXiv 2201.11903. For questions in another
language use `--examples`.
"""

import re
from argparse import ArgumentParser, Namespace
from decimal import Decimal
from functools import partial
from pathlib import Path

import core
import reading
from reading import Item

SOURCE = (
    "get grade_school_math/data/test.jsonl from https://github.com/openai/grade-school-math, "
    "a file or the folder with it"
)
HUB_NAME = "openai/gsm8k"
STOP = "Q:"  # a base model continues with another question
# Full NFKC would turn m² into m2, and the 2 would be read as a number.
ASCII = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x2212: "-"}  # full-width forms, minus sign
TEX = re.compile(r"\{(,)\}|\\([$%])|(?<=\d)(?:\\[ ,;:!]|~)(?=\d{3})")  # 8{,}000, \$8, 8\,000
SPACE = "[ \u00a0\u2009\u202f]"  # between thousands
NUMBER = re.compile(
    rf"(?<![\d.])-?\$?(?:\d{{1,3}}(?:{SPACE}\d{{3}})+(?!\d)(?:\.\d+)?"
    r"|\d+(?:,\d{3})*(?:\.\d+)?|(?<!\w)\.\d+)"
)
PHRASE = re.compile(
    r"(?:the answer is|答案是|答案为|答案(?=:)|\\boxed\{)(?:[\s:*]|\.{2,})*", re.IGNORECASE
)
SENTENCE_END = re.compile(r"\.(?=\s|$)|[!?。]")


def normalize(number: str) -> str:
    """Return a number in one spelling: "$1,200.00", "1 200" and "1200" become "1200"."""
    digits = re.sub(r"[$,\s]", "", number)
    return f"{Decimal(digits).normalize():f}"


def extract(output: str) -> str:
    """Return the number after "The answer is" or in \\boxed{}, or else the last number, or "".

    In an equation it is the number after the last "=".
    """
    output = TEX.sub(r"\1\2", output.translate(ASCII))
    if phrase := PHRASE.search(output):
        line = output[phrase.end() :].partition("\n")[0]
        sentence = SENTENCE_END.split(line)[0]
        for text in (sentence.rpartition("=")[2], sentence, line):
            if number := NUMBER.search(text):
                return normalize(number[0])
    numbers = NUMBER.findall(output)
    return normalize(numbers[-1]) if numbers else ""


def load_items(args: Namespace) -> list[Item]:
    if not args.examples.is_file():
        raise SystemExit(f"--examples {args.examples}: there is no such file.")
    examples, data = reading.read_text(args.examples).strip(), args.data
    if data == HUB_NAME:
        rows = reading.load_hub(data, "main", "test")
    else:
        path = reading.locate_data(data, SOURCE)
        path = path / "test.jsonl" if path.is_dir() else path
        if not path.exists():
            raise SystemExit(f"{path.parent} has no test.jsonl: {SOURCE}.")
        rows = reading.read_json_lines(path)
        reading.check_fields(path, rows, question=str, answer=str)
    items = []
    for i, row in enumerate(rows):
        prompt = f"{examples}\n\nQ: {row['question']}\nA:"
        _, mark, value = row["answer"].rpartition("####")
        answer = extract(value) if mark or NUMBER.fullmatch(value.strip()) else ""
        if not answer:
            raise SystemExit(
                f"--data {data}, item {i + 1}: there is no number after ####: {value[-60:]!r}."
            )
        items.append(Item("gsm8k", str(i), prompt, answer))
    return items


def add_arguments(parser: ArgumentParser):
    parser.add_argument(
        "--examples",
        type=Path,
        default=reading.HERE / "gsm8k_cot.txt",
        help='text file of worked examples, "Q: ... A: ..." (default: %(default)s)',
    )


BENCHMARK = core.Benchmark(
    name="gsm8k",
    description=__doc__,
    data="GSM8K",
    load_items=load_items,
    answer=partial(core.answer_few_shot, stop=STOP, extract=lambda output, item: extract(output)),
    hub_name=HUB_NAME,
    add_arguments=add_arguments,
)
main = partial(core.main, BENCHMARK)

if __name__ == "__main__":
    core.utils.run_script(main)
