"""core.py: batches, resuming after kill -9, two processes, scores, tables."""

import json
import os
import random
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
from fake_models import FakeModel, evaluate

from chatglm2.quantization import ChatGLMQuantizationConfig

SCRIPT = ROOT / "evaluation" / "evaluate_ceval.py"
SUBJECTS = ("law", "logic", "marxism")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven short questions of each of three subjects, in the processed data's form."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for subject in SUBJECTS:
        path = folder / "val" / "x" / f"{subject}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(7):
            text = f"{subject} {rng.random()}" + " 好" * rng.randint(0, 20)
            rows.append({"id": i, "inputs_pretokenized": text, "targets_pretokenized": ["C"]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
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


def read_results(folder) -> dict:
    """Return the results without what differs between two equal runs."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    return {key: results[key] for key in results.keys() - {"seconds", "date", "processes"}}


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
    """The output folder of an uninterrupted run of one process."""
    folder, options = tmp_path_factory.mktemp("whole"), ("--batch-size", "3")
    options += ("--model", "resources/chatglm2-tiny")
    evaluate(evaluate_ceval, tiny_model, tiny_tokenizer, data, folder, *options)
    return folder


@pytest.mark.slow
def test_a_killed_run_continues(data, whole_run, tmp_path):
    path = tmp_path / "items.jsonl"
    process = start(SCRIPT.parent, data, tmp_path)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    with pytest.raises(SystemExit, match=r"another run is writing there: .*another --output"):
        core.hold(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = path.read_bytes()
    _, before = read_journal(tmp_path)
    assert 4 <= len(before) < 21 and not (tmp_path / "results.json").exists()

    lines = finished.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # cut off in a line
    process = start(ROOT, data, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    _, after = read_journal(tmp_path)
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) == len({record["key"] for record in after}) == 21
    assert sorted(after, key=str) == sorted(read_journal(whole_run)[1], key=str)
    assert read_results(tmp_path) == read_results(whole_run)
    assert "| chatglm2-tiny | " in output


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(data, whole_run, tmp_path):
    """Nine batches: the last is left for one of the two."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(SCRIPT), *command(data, tmp_path, "--batch-size", "3")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    _, records = read_journal(tmp_path)
    assert len(records) == 21
    assert sorted(records, key=str) == sorted(read_journal(whole_run)[1], key=str)
    assert read_results(tmp_path) == read_results(whole_run)
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["processes"] == 2
    assert result.stdout.count("| chatglm2-tiny | ") == 1


def test_several_processes_with_several_gpus_each(monkeypatch):
    monkeypatch.setattr(core, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    args = core.parse_args(evaluate_ceval.BENCHMARK, ["--num-gpus", "2"])
    with pytest.raises(SystemExit, match="--num-gpus 2: each of 2 processes takes a GPU of its"):
        core.start_processes(args)


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
    with core.hold(tmp_path), pytest.raises(SystemExit, match="another run is writing there"):
        run()
    run()


def test_a_finished_run_computes_nothing_again(run, tiny_tokenizer, tmp_path):
    for model in ("resources/chatglm2-tiny", "./resources/chatglm2-tiny/"):  # two spellings
        fake = FakeModel(tiny_tokenizer)
        run("--model", model, model=fake)
    assert not fake.generate_calls
    assert read_results(tmp_path)["accuracy"] == 100


def test_a_limited_run_is_continued_by_a_larger_one(run, tiny_tokenizer, tmp_path):
    assert run("--limit", "2")["num_items"] == 6
    model = FakeModel(tiny_tokenizer)
    results = run("--limit", "3", "--batch-size", "1", model=model)
    assert results["num_items"] == 9 and len(model.generate_calls) == 3
    # the records of the others are kept, but not counted
    assert run("--subjects", "law", "--limit", "1", model=model)["num_items"] == 1
    assert len(read_journal(tmp_path)[1]) == 9


def test_other_settings_are_refused(run, tiny_tokenizer, data, tmp_path):
    output = tmp_path / "out"
    run("--limit", "1", folder=output)
    before = (output / "items.jsonl").read_bytes()
    half, trained = FakeModel(tiny_tokenizer), FakeModel(tiny_tokenizer)
    half.dtype = torch.float16
    trained.weight = torch.nn.Parameter(torch.ones(1))
    changed = tmp_path / "data"
    for path in data.glob("val/x/*"):
        (changed / "val" / "x").mkdir(parents=True, exist_ok=True)
        (changed / "val" / "x" / path.name).write_text(path.read_text("utf-8").replace("C", "D"))
    for name, other in (
        ("precision 'float32', now it is 'float16'", {"model": half}),
        ("weights", {"model": trained}),
        ("data", {"data": changed}),
    ):
        with pytest.raises(SystemExit, match=f"is of a run with {name}.*--output") as error:
            run(**other, folder=output)
        assert "\n" not in str(error.value)
    assert (output / "items.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt, "interrupted; 7 items are in .*: the same command goes on"),
        (
            torch.OutOfMemoryError,
            "out of memory; 7 items are in .* with a --batch-size smaller than 8 goes on",
        ),
    ],
)
def test_an_interrupted_run_reports_what_is_kept(run, fake, tiny_tokenizer, error, expected):
    generate = fake.generate

    def fail_later(*args, **kwargs):
        if fake.generate_calls:
            raise error
        return generate(*args, **kwargs)

    fake.generate = fail_later
    with pytest.raises(SystemExit, match=expected):
        run()
    assert run(model=FakeModel(tiny_tokenizer))["num_items"] == 21


def test_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    append = core.append

    def fail_later(path, records):
        if path.exists() and path.read_bytes().count(b"\n") > 7:
            raise OSError(28, "No space left on device")
        append(path, records)

    monkeypatch.setattr(core, "append", fail_later)
    with pytest.raises(SystemExit, match=r"No space left on device; 7 items are in .*: the same"):
        run()
    monkeypatch.undo()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(SystemExit, match=r"results\.json: Is a directory; 21 items are in"):
        run()


def test_an_output_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--output .*file: "):
        run(folder=tmp_path / "file")


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


def test_the_progress_counts_selected_items_only(run, tiny_tokenizer, capsys):
    run("--subjects", "law", model=FakeModel(tiny_tokenizer, letter=lambda text: "A"))
    capsys.readouterr()
    run("--subjects", "logic")
    assert "accuracy 100.00%" in (bar := capsys.readouterr().err) and "50.00%" not in bar


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
    whole = core.generate(tiny_model, tiny_tokenizer, prompts)
    stop = whole[1][4:6]
    steps = []
    with_hook = tiny_model.register_forward_hook(lambda *args: steps.append(1))
    core.generate(tiny_model, tiny_tokenizer, prompts[1:2], stop=stop)
    with_hook.remove()
    assert len(steps) < len(tiny_tokenizer.encode(whole[1], add_special_tokens=False))
    stopped = core.generate(tiny_model, tiny_tokenizer, prompts, stop=stop)
    assert stopped == [text.partition(stop)[0] for text in whole] != whole


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
