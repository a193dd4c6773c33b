"""Items of benchmarks: reading them from files or the hub, selecting them, few-shot prompts."""

import csv
import json
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from chatglm2.errors import one_line  # noqa: E402

SUBJECTS = json.loads((HERE / "subjects.json").read_text("utf-8"))  # by benchmark and category
LETTERS = "ABCD"
NUM_EXAMPLES = 5  # of a few-shot prompt, answer only


@dataclass(frozen=True)
class Item:
    subject: str
    id: str  # unique within the subject
    prompt: str  # without the chat format
    answer: str  # equals the prediction if that is right; "" if it is not published
    category: str = ""

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.id}"


def map_categories(benchmark: str) -> dict[str, str]:
    """Return the category of each subject."""
    return {subject: name for name, subjects in SUBJECTS[benchmark].items() for subject in subjects}


@contextmanager
def exit_in_one_line(what: str | Path):
    """End the program with `what` and the reason if a file cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{what}: {error.strerror or one_line(error)}.") from error


def locate_data(name: str, source: str) -> Path:
    """Return the path `--data`, relative to the current folder or else to this one."""
    for path in (Path(name).expanduser(), HERE / name):
        with exit_in_one_line(f"--data {name}"):
            if path.exists():
                return path
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
    """Return `parse(file)` of a text file in UTF-8."""
    try:
        with exit_in_one_line(path), path.open(encoding="utf-8-sig", newline=newline) as file:
            return parse(file)
    except (ValueError, csv.Error) as error:
        raise SystemExit(f"{path} is damaged ({one_line(error)}): {remedy}.") from error


def read_text(path: Path) -> str:
    return read_file(path, lambda file: file.read(), "it must be a text in UTF-8")


def read_csv(path: Path, reader=csv.reader) -> list:
    return read_file(path, lambda file: list(reader(file)), newline="")


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
    counts, selected = Counter(), []
    for item in items:
        counts[item.subject] += 1
        if (not subjects or item.subject in subjects) and counts[item.subject] <= (limit or 1e9):
            selected.append(item)
    return selected


def add_examples(items: list[Item], examples: list[Item], make_title, lead: str) -> list[Item]:
    """Return the items as few-shot prompts: a title, 5 examples with answers, the question.

    Args:
        make_title: Takes a subject.
        lead: Text in front of an answer.
    """
    texts = defaultdict(list)
    for example in examples:
        if not example.answer:
            raise SystemExit(f"--mode base: an example (dev) of {example.subject} has no answer.")
        texts[example.subject].append(f"{example.prompt}\n{lead}{example.answer}")
    prompts = []
    for item in items:
        if item.subject not in texts:
            raise SystemExit(f"--mode base: there are no examples (dev) of {item.subject}.")
        parts = [make_title(item.subject), *texts[item.subject][:NUM_EXAMPLES]]
        prompts.append("\n\n".join([*parts, f"{item.prompt}\n{lead.rstrip()}"]))
    return [replace(item, prompt=prompt) for item, prompt in zip(items, prompts, strict=True)]
