"""Measure a checkpoint on BIG-Bench Hard, with its authors' worked examples (few-shot CoT).

    python evaluate_bbh.py --data BIG-Bench-Hard
    python evaluate_bbh.py --data BIG-Bench-Hard --mode base        # a base model

`--data` is the repository of its authors, with bbh/*.json and cot-prompts/*.txt.
"""

import json
import re
from argparse import Namespace
from functools import partial

import core
import reading
from reading import Item

SOURCE = "git clone https://github.com/suzgunmirac/BIG-Bench-Hard"
STOP = "\n\nQ:"  # a base model continues with another question
PHRASE = re.compile(
    r"(?:\bthe (?:\w+ ){0,2}answer is|答案是|答案为|答案(?=\s*[:：]))[\s:：*]*", re.IGNORECASE
)
SENTENCE_END = re.compile(r"\.(?=\s|[*\"']|$)|[!?。！？\n]")
OPTIONS = (  # in the order of preference; bare letters must follow the phrase directly
    re.compile(r"^[\"'`]*(?:option |选项)?([A-R])(?=[*\"'`]*(?:[.,;:!)。，；：！]|\s*$))"),
    re.compile(r"(?<!not )[(（]([A-Ra-r])[)）]"),
    re.compile(r"^[\"'`]*(?:option |选项)?([A-HJ-R])(?![A-Za-z'’])"),  # "I" is the pronoun
)
VERDICT = re.compile(r"(yes|no|true|false|valid|invalid)[,，]")


def normalize(answer: str) -> str:
    return " ".join(answer.strip(" \t*`\"'").lower().split())


def extract(output: str, has_options: bool) -> str:
    """Return the text from the last "the answer is" to the end of the sentence, or "".

    Args:
        has_options: The answer is one of "(A)", "(B)", ...; the letter alone is accepted.
    """
    *_, rest = PHRASE.split(output)
    if rest == output:
        return ""
    line = rest.partition("\n")[0]
    if has_options and (option := next(filter(None, (o.search(line) for o in OPTIONS)), None)):
        return f"({option[1]})".lower()
    answer = normalize(SENTENCE_END.split(rest)[0])
    verdict = VERDICT.match(answer)
    return verdict[1] if verdict else answer


def load_items(args: Namespace) -> list[Item]:
    folder = reading.locate_data(args.data, SOURCE)
    paths = sorted((folder / "bbh").glob("*.json"))
    if not paths:
        raise SystemExit(f"{folder} has no bbh/*.json: {SOURCE}.")
    items = []
    for path in paths:
        examples = folder / "cot-prompts" / f"{path.stem}.txt"
        if not examples.exists():
            raise SystemExit(f"{examples} is missing: {SOURCE}.")
        # The first lines ask not to train on the file.
        text = reading.read_text(examples).rpartition("\n-----\n")[2].strip()
        content = reading.read_file(path, json.load)
        reading.check_fields(path, [content], examples=list)
        rows = content["examples"]
        reading.check_fields(path, rows, input=str, target=str)
        for i, row in enumerate(rows):
            prompt = f"{text}\n\nQ: {row['input']}\nA: Let's think step by step."
            items.append(Item(path.stem, str(i), prompt, normalize(row["target"])))
    return items


def extract_prediction(output: str, item: Item) -> str:
    return extract(output, has_options="\n(A) " in item.prompt)


BENCHMARK = core.Benchmark(
    name="bbh",
    description=__doc__,
    data="BBH",
    load_items=load_items,
    answer=partial(core.answer_few_shot, stop=STOP, extract=extract_prediction),
    weigh_subjects_equally=True,
)
main = partial(core.main, BENCHMARK)

if __name__ == "__main__":
    core.utils.run_script(main)
