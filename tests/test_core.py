"""core.py: batches, resuming after kill -9, two processes, scores, tables."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import core
import evaluate_ceval
import pytest
import torch
from conftest import ROOT
from fake_models import FakeModel, evaluate, write_lines
from loading import fail

from chatglm2.quantization import ChatGLMQuantizationConfig

SCRIPT = ROOT / "evaluation" / "evaluate_ceval.py"
SUBJECTS = ("law", "logic", "marxism")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven short questions of each of three subjects, in the processed data's form."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for subject in SUBJECTS:
        texts = [f"{subject} {i}" + " 好" * rng.randint(0, 20) for i in range(7)]
        rows = [
            {"id": i, "inputs_pretokenized": text, "targets_pretokenized": ["C"]}
            for i, text in enumerate(texts)
        ]
        write_lines(folder / "val" / f"{subject}.jsonl", rows)
    return folder


@pytest.fixture
def fake(tiny_tokenizer):
    return FakeModel(tiny_tokenizer)


@pytest.fixture
def run(fake, tiny_tokenizer, data, tmp_path):
    """Return a function that runs C-Eval in this process, into `tmp_path`."""

    def run(*options, model=fake, data=data, folder=tmp_path):
        return evaluate(evaluate_ceval, model, tiny_tokenizer, data, folder, *options)

    return run


def read_journal(folder) -> tuple[dict, list[dict]]:
    header, *records = map(json.loads, (folder / "items.jsonl").read_text("utf-8").splitlines())
    return header, records


def read_run(folder) -> tuple[list[dict], dict]:
    """Return the sorted records, and the results without what differs between two equal runs."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    results = {key: results[key] for key in results.keys() - {"seconds", "date", "processes"}}
    return sorted(read_journal(folder)[1], key=str), results


# Processes.


def command(data, output, *options) -> list[str]:
    fixed = ["--model", "resources/chatglm2-tiny", "--device", "cpu", "--threads", "1"]
    return ["--data", str(data), "--output", str(output), *fixed, *options]


def start(folder, data, output):
    """Start the script from a folder, by its path relative to that."""
    words = [sys.executable, str(SCRIPT.relative_to(folder))]
    words += command(data, output, "--batch-size", "3")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=folder, text=True, **streams)


@pytest.fixture(scope="module")
def whole_run(tiny_model, tiny_tokenizer, data, tmp_path_factory):
    """Records and results of an uninterrupted run of one process."""
    folder, options = tmp_path_factory.mktemp("whole"), ("--batch-size", "3")
    options += ("--model", "resources/chatglm2-tiny")
    evaluate(evaluate_ceval, tiny_model, tiny_tokenizer, data, folder, *options)
    return read_run(folder)


@pytest.mark.slow
def test_a_killed_run_continues(data, whole_run, tmp_path):
    path = tmp_path / "items.jsonl"
    process = start(SCRIPT.parent, data, tmp_path)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, before = read_journal(tmp_path)
    assert 4 <= len(before) < 21 and not (tmp_path / "results.json").exists()

    os.truncate(path, path.stat().st_size - 10)  # cut off in a line
    process = start(ROOT, data, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    _, after = read_journal(tmp_path)
    assert after[: len(before) - 1] == before[:-1]
    assert read_run(tmp_path) == whole_run and len(after) == 21
    assert "| chatglm2-tiny | " in output


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(data, whole_run, tmp_path):
    """Nine batches: the last is left for one of the two."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(SCRIPT), *command(data, tmp_path, "--batch-size", "3")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert read_run(tmp_path) == whole_run
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["processes"] == 2
    assert result.stdout.count("| chatglm2-tiny | ") == 1


def test_several_processes_with_several_gpus_each(monkeypatch):
    monkeypatch.setattr(core, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    args = core.parse_args(evaluate_ceval.BENCHMARK, ["--num-gpus", "2"])
    assert "--num-gpus 2: each of 2 processes takes a GPU" in fail(core.start_processes, args)


# Continuing.


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantized_while_loading(data, tmp_path, bits, monkeypatch):
    """On a CPU the quantized weights may have no data; a second run continues the first."""
    monkeypatch.setattr(core, "MAX_NEW_TOKENS", 5)
    for limit in ("1", "2"):
        evaluate_ceval.main(command(data, tmp_path, "--quantize", bits, "--limit", limit))
        header, records = read_journal(tmp_path)
        assert header["precision"] == f"float32 with INT{bits} weights"
        assert len(records) == 3 * int(limit)


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path):
    with core.hold(tmp_path):
        assert "another run is writing there" in fail(run)


def test_a_finished_run_computes_nothing_again(run, tiny_tokenizer, tmp_path):
    run("--model", "resources/chatglm2-tiny")
    model = FakeModel(tiny_tokenizer)
    assert run("--model", "./resources/chatglm2-tiny/", model=model)["accuracy"] == 100
    assert not model.generate_calls


def test_a_limited_run_is_continued_by_a_larger_one(run, fake, tmp_path, capsys):
    fake.letter = lambda text: "C" if "logic" in text else "A"
    assert run("--limit", "2")["num_items"] == 6
    calls = len(fake.generate_calls)
    results = run("--limit", "3", "--batch-size", "1")
    assert results["num_items"] == 9 and len(fake.generate_calls) == calls + 3
    capsys.readouterr()
    # the records of the others are kept, but not counted
    assert run("--subjects", "logic", "--limit", "4")["num_items"] == 4
    assert "accuracy 100.00%" in (bar := capsys.readouterr().err) and "40.00%" not in bar
    assert len(read_journal(tmp_path)[1]) == 10


def test_other_settings_are_refused(run, tiny_tokenizer, data, tmp_path):
    output = tmp_path / "out"
    run("--limit", "1", folder=output)
    before = (output / "items.jsonl").read_bytes()
    half, trained = FakeModel(tiny_tokenizer), FakeModel(tiny_tokenizer)
    half.dtype = torch.float16
    trained.weight = torch.nn.Parameter(torch.ones(1))
    changed = shutil.copytree(data, tmp_path / "data")
    path = changed / "val" / "law.jsonl"
    path.write_text(path.read_text("utf-8").replace("C", "D"), "utf-8")
    for name, other in (
        ("precision 'float32', now it is 'float16'", {"model": half}),
        ("weights", {"model": trained}),
        ("data", {"data": changed}),
    ):
        message = fail(run, **other, folder=output)
        assert f"is of a run with {name}" in message and "--output" in message
    assert (output / "items.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), "interrupted; {}: the same command goes on"),
        (torch.OutOfMemoryError(), "out of memory; {} with a --batch-size smaller than 8 goes on"),
        (OSError(28, "No space left on device"), "No space left on device; {}: the same command"),
    ],
)
def test_an_interrupted_run_reports_what_is_kept(run, monkeypatch, error, expected):
    append = core.append

    def fail_later(path, records):
        if path.exists() and path.read_bytes().count(b"\n") > 7:
            raise error
        append(path, records)

    monkeypatch.setattr(core, "append", fail_later)
    with pytest.raises(SystemExit, match=expected.format("7 items are in .*")):
        run()
    monkeypatch.undo()
    assert run()["num_items"] == 21


def test_an_output_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "results.json").mkdir()
    assert "results.json: Is a directory; 21 items are in" in fail(run)
    (tmp_path / "file").write_text("")
    assert f"--output {tmp_path}/file: " in fail(run, folder=tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not json", r"is damaged .* remove "),
        *((text, "is not of an evaluation: .*--output") for text in ("[]", '{"a": 1}', "", " ")),
        ('{"benchmark": "x"}\n[]', "is not of an evaluation: .*--output"),
    ],
)
def test_a_damaged_or_foreign_journal_is_one_line(tmp_path, text, expected):
    (tmp_path / "items.jsonl").write_text(text + "\n")
    with pytest.raises(SystemExit, match=rf"items\.jsonl {expected}"):
        core.open_journal(tmp_path, {"benchmark": "x"})
    assert (tmp_path / "items.jsonl").read_text() == text + "\n"


def test_a_header_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"benchm')
    assert core.open_journal(tmp_path, {"benchmark": "x"}) == {}
    assert json.loads(path.read_text()) == {"benchmark": "x"}


# Batches, scores, tables.


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("length", [["a/1", "b/0"], ["a/0", "a/2"]]),  # the longest first
        ("file", [["a/0", "a/1"], ["a/2"], ["b/0"]]),  # of one subject
    ],
)
def test_batches(tiny_tokenizer, fake, order, expected):
    words = {"a/0": 3, "a/1": 9, "a/2": 1, "b/0": 8}
    items = [core.Item(*key.split("/"), "hello " * count, "C") for key, count in words.items()]
    args = SimpleNamespace(batch_size=2, order=order)
    batches = core.plan_batches(items, fake, tiny_tokenizer, args)
    assert [[item.key for item in batch] for batch in batches] == expected


def test_prompts_beyond_the_context_are_reported(run, fake, capsys):
    fake.config.seq_length = 20
    run("--limit", "2")
    assert "prompts are longer than the model's context of 20 tokens" in capsys.readouterr().err


def test_a_stop_text_ends_generation_and_is_cut_off(tiny_model, tiny_tokenizer):
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("你好", "讲个笑话", "thank you")]
    whole, steps = core.generate(tiny_model, tiny_tokenizer, prompts), []
    stop = whole[1][4:6]
    stopped = core.generate(tiny_model, tiny_tokenizer, prompts, stop=stop)
    assert stopped == [text.partition(stop)[0] for text in whole] != whole
    hook = tiny_model.register_forward_hook(lambda *args: steps.append(1))
    core.generate(tiny_model, tiny_tokenizer, prompts[1:2], stop=stop)
    hook.remove()
    assert len(steps) < len(tiny_tokenizer.encode(whole[1], add_special_tokens=False))


def test_scores():
    items = [core.Item("a", str(i), "", "C", "STEM") for i in range(3)]
    items += [core.Item("b", "0", "", "C", "Others")]
    records = [{"correct": correct} for correct in (True, True, False, False)]
    results = core.score(items, records)
    assert results["accuracy"] == 50
    assert results["subjects"] == {"a": pytest.approx(200 / 3), "b": 0}
    assert results["categories"] == {"STEM": pytest.approx(200 / 3), "Others": 0}
    equal = core.score(items, records, weigh_subjects_equally=True)
    assert equal["accuracy"] == pytest.approx(100 / 3)
    assert core.format_results({"model": "a/b", **results}).splitlines() == [
        "| Model | Average |  STEM | Others |",
        "| ----- | ------- | ----- | ------ |",
        "| b     |   50.00 | 66.67 |   0.00 |",
    ]
    bare = core.format_results({"model": "b", "accuracy": 50, "categories": {}})
    assert bare.startswith("| Model | Accuracy |\n")


def test_the_default_folder_names_model_mode_and_precision(fake, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, mode, dtype, bits, expected in [
        ("zai-org/chatglm2-6b", "chat", torch.float32, 0, "chatglm2-6b-chat-float32"),
        (f"{tmp_path}/mine/../mine", "base", torch.bfloat16, 4, "mine-base-bfloat16-int4"),
        (f"{tmp_path}/mine/.", "base", torch.float16, 8, "mine-base-float16-int8"),
    ]:
        fake.dtype = dtype
        config = ChatGLMQuantizationConfig(bits=bits).to_dict() if bits else None
        fake.config.quantization_config = config
        args = core.parse_args(evaluate_ceval.BENCHMARK, ["--model", name, "--mode", mode])
        assert core.locate_output("x", fake, args).as_posix() == f"results/x-{expected}"
