"""core.py: batches, resuming after kill -9, two processes, scores, tables."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fake_models import FakeModel

SCRIPT = ROOT / "evaluation" / "evaluate_ceval.py"
SUBJECTS = ("law", "logic", "marxism")


@pytest.fixture(scope="module")
def core():
    import core

    return core


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve short questions of each of three subjects, in the processed data's form."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for subject in SUBJECTS:
        path = folder / "val" / "x" / f"{subject}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(12):
            text = f"{subject} {rng.random()}" + " 好" * rng.randint(0, 20)
            rows.append({"id": i, "inputs_pretokenized": text, "targets_pretokenized": ["C"]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def command(data, output, *options):
    fixed = ["--model", "resources/chatglm2-tiny", "--device", "cpu", "--threads", "1"]
    return [str(SCRIPT), "--data", str(data), "--output", str(output), *fixed, *options]


def start(folder, data, output):
    """Start the script from a folder, by its path relative to that."""
    _, *options = command(data, output, "--batch-size", "5")
    words = [sys.executable, str(SCRIPT.relative_to(folder)), *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=folder, text=True, **streams)


def read_journal(folder) -> tuple[dict, list[dict]]:
    header, *records = map(json.loads, (folder / "items.jsonl").read_text("utf-8").splitlines())
    return header, records


def read_results(folder) -> dict:
    """Return what two runs of the same must have in common."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    return {key: results[key] for key in results.keys() - {"seconds", "date", "processes"}}


def run_here(core, model, tokenizer, data, output, *options):
    import evaluate_ceval

    args = evaluate_ceval.parse_args(command(data, output, *options)[1:])
    items = evaluate_ceval.load_items(args.data, args.split, args.mode)
    selected = core.select(items, args.subjects, args.limit)
    return evaluate_ceval.evaluate(model, tokenizer, items, selected, args)


@pytest.fixture(scope="module")
def whole_run(core, tiny_model, tiny_tokenizer, data, tmp_path_factory):
    """The output folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(core, tiny_model, tiny_tokenizer, data, folder, "--batch-size", "5")
    return folder


def test_a_killed_run_goes_on_where_it_was(core, data, whole_run, tmp_path):
    path = tmp_path / "items.jsonl"
    process = start(SCRIPT.parent, data, tmp_path)
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 7:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    with pytest.raises(SystemExit, match=r"another run is writing there: .*another --output"):
        core.hold(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = path.read_bytes()
    _, before = read_journal(tmp_path)
    assert 6 <= len(before) < 36 and not (tmp_path / "results.json").exists()

    lines = finished.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # cut off in a line
    process = start(ROOT, data, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    _, after = read_journal(tmp_path)
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) == len({record["key"] for record in after}) == 36
    assert sorted(after, key=str) == sorted(read_journal(whole_run)[1], key=str)
    assert read_results(tmp_path) == read_results(whole_run)
    assert "| chatglm2-tiny | " in output


def test_two_processes_give_the_results_of_one(data, whole_run, tmp_path):
    """Nine batches: the last is left for one of the two."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += command(data, tmp_path, "--batch-size", "5")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    _, records = read_journal(tmp_path)
    assert len(records) == 36
    assert sorted(records, key=str) == sorted(read_journal(whole_run)[1], key=str)
    assert read_results(tmp_path) == read_results(whole_run)
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["processes"] == 2
    assert result.stdout.count("| chatglm2-tiny | ") == 1


def test_several_processes_with_several_gpus_each(core, monkeypatch):
    monkeypatch.setattr(core, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    args = core.create_parser("", data="data").parse_args(["--num-gpus", "2"])
    with pytest.raises(SystemExit, match="--num-gpus 2: each of 2 processes takes a GPU of its"):
        core.load_model(args)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantized_while_loading(core, data, tmp_path, bits, monkeypatch):
    """On a CPU the quantized weights may have no data; a second run goes on from the first."""
    import evaluate_ceval

    monkeypatch.setattr(core, "MAX_NEW_TOKENS", 5)
    for limit in ("1", "2"):
        evaluate_ceval.main(command(data, tmp_path, "--quantize", bits, "--limit", limit)[1:])
        header, records = read_journal(tmp_path)
        assert header["precision"] == f"float32 with INT{bits} weights"
        assert len(records) == 3 * int(limit)


def test_a_second_run_into_the_same_folder_is_refused(core, tiny_tokenizer, data, tmp_path):
    with core.hold(tmp_path), pytest.raises(SystemExit, match="another run is writing there"):
        run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path)
    run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path)


def test_a_finished_run_computes_nothing_anew(core, tiny_tokenizer, data, tmp_path):
    for _ in range(2):
        model = FakeModel(tiny_tokenizer)
        run_here(core, model, tiny_tokenizer, data, tmp_path)
    assert not model.generate_calls
    assert read_results(tmp_path)["accuracy"] == 100


def test_a_limited_run_is_continued_by_a_larger_one(core, tiny_tokenizer, data, tmp_path):
    run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path, "--limit", "2")
    assert read_results(tmp_path)["num_items"] == 6
    model = FakeModel(tiny_tokenizer)
    options = ("--limit", "3", "--batch-size", "1")
    run_here(core, model, tiny_tokenizer, data, tmp_path, *options)
    assert read_results(tmp_path)["num_items"] == 9 and len(model.generate_calls) == 3
    # fewer again: the records of the others are kept, but not counted
    run_here(core, model, tiny_tokenizer, data, tmp_path, "--subjects", "law", "--limit", "1")
    assert read_results(tmp_path)["num_items"] == 1 and len(read_journal(tmp_path)[1]) == 9


def test_other_settings_are_refused(core, tiny_tokenizer, data, tmp_path):
    import torch

    output = tmp_path / "out"
    run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, output, "--limit", "1")
    before = (output / "items.jsonl").read_bytes()

    def refused(name, model=None, data=data, options=()):
        with pytest.raises(SystemExit, match=f"is of a run with {name}.*--output") as error:
            run_here(
                core, model or FakeModel(tiny_tokenizer), tiny_tokenizer, data, output, *options
            )
        assert "\n" not in str(error.value)
        assert (output / "items.jsonl").read_bytes() == before

    half = FakeModel(tiny_tokenizer)
    half.dtype = torch.float16
    refused("precision 'float32', now it is 'float16'", half)
    trained = FakeModel(tiny_tokenizer)
    trained.weight = torch.nn.Parameter(torch.ones(1))
    refused("weights", trained)
    changed = tmp_path / "data"
    for path in data.glob("val/x/*"):
        (changed / "val" / "x").mkdir(parents=True, exist_ok=True)
        (changed / "val" / "x" / path.name).write_text(path.read_text("utf-8").replace("C", "D"))
    refused("data", data=changed)


def test_another_spelling_of_the_model_goes_on(core, tiny_tokenizer, data, tmp_path):
    for model in ("resources/chatglm2-tiny", "./resources/chatglm2-tiny/"):
        fake = FakeModel(tiny_tokenizer)
        run_here(core, fake, tiny_tokenizer, data, tmp_path, "--model", model, "--limit", "1")
    assert not fake.generate_calls


def test_the_default_folder_tells_model_mode_and_precision(core, tiny_tokenizer, tmp_path):
    import evaluate_ceval
    import torch

    from chatglm2.quantization import ChatGLMQuantizationConfig

    model = FakeModel(tiny_tokenizer)
    (tmp_path / "mine").mkdir()
    for name, mode, dtype, bits, expected in [
        ("zai-org/chatglm2-6b", "chat", torch.float32, 0, "chatglm2-6b-chat-float32"),
        (f"{tmp_path}/mine/../mine", "base", torch.bfloat16, 4, "mine-base-bfloat16-int4"),
        (f"{tmp_path}/mine/.", "base", torch.float16, 8, "mine-base-float16-int8"),
    ]:
        model.dtype = dtype
        config = ChatGLMQuantizationConfig(bits=bits).to_dict() if bits else None
        model.config.quantization_config = config
        args = evaluate_ceval.parse_args(["--model", name, "--mode", mode])
        assert core.locate_output("x", model, args).as_posix() == f"results/x-{expected}"
    table = core.format_table({"model": f"{tmp_path}/mine/.", "accuracy": 1, "categories": {}})
    assert "| mine |" in table


def test_a_full_disk_is_one_line(core, tiny_tokenizer, data, tmp_path, monkeypatch):
    append = core.append

    def fail_later(path, records):
        if path.exists() and path.read_bytes().count(b"\n") > 8:
            raise OSError(28, "No space left on device")
        append(path, records)

    monkeypatch.setattr(core, "append", fail_later)
    expected = "^No space left on device; 8 items are in .*: the same command goes on from there.$"
    with pytest.raises(SystemExit, match=expected):
        run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path)
    monkeypatch.undo()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(SystemExit, match=r"results\.json: Is a directory; the finished items are"):
        run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path)


@pytest.mark.parametrize("kind", ["interrupt", "memory"])
def test_an_interrupted_run_says_what_is_kept(core, tiny_tokenizer, data, tmp_path, kind):
    import torch

    error = {"interrupt": KeyboardInterrupt, "memory": torch.OutOfMemoryError}[kind]
    expected = {
        "interrupt": "interrupted; 8 items are in .*: the same command goes on",
        "memory": "out of memory; 8 items are in .* with a --batch-size smaller than 8 goes on",
    }
    model = FakeModel(tiny_tokenizer)
    generate = model.generate

    def fail_later(*args, **kwargs):
        if model.generate_calls:
            raise error
        return generate(*args, **kwargs)

    model.generate = fail_later
    with pytest.raises(SystemExit, match=expected[kind]):
        run_here(core, model, tiny_tokenizer, data, tmp_path)
    run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path)
    assert read_results(tmp_path)["num_items"] == 36


def test_an_output_that_cannot_be_written_is_one_line(core, tiny_tokenizer, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--output .*file: "):
        run_here(core, FakeModel(tiny_tokenizer), tiny_tokenizer, data, tmp_path / "file")


def test_a_damaged_journal_is_one_line(core, tmp_path):
    (tmp_path / "items.jsonl").write_text("not json\n")
    with pytest.raises(SystemExit, match=r"items\.jsonl is damaged .* remove "):
        core.open_journal(tmp_path, {})


def test_a_file_of_another_benchmark_is_told(core, tmp_path):
    core.check_fields(tmp_path / "x", [{"question": "", "answer": 0}], question=str, answer=int)
    with pytest.raises(SystemExit, match="x, item 2: there is no answer; is it another"):
        core.check_fields(tmp_path / "x", [{"answer": "1"}, {"question": "?"}], answer=str)
    for row in (["answer"], "answer", 1, None, {"answer": 1}):
        with pytest.raises(SystemExit, match="x, item 1: there is no answer"):
            core.check_fields(tmp_path / "x", [row], answer=str)


@pytest.mark.parametrize("text", ["[]", "1", '{"a": 1}', '{"benchmark": "x"}\n[]', "", " \n"])
def test_a_foreign_journal_is_one_line(core, tmp_path, text):
    (tmp_path / "items.jsonl").write_text(text + "\n")
    with pytest.raises(SystemExit, match=r"items\.jsonl is not of an evaluation: .*--output"):
        core.open_journal(tmp_path, {"benchmark": "x"})
    assert (tmp_path / "items.jsonl").read_text() == text + "\n"


@pytest.mark.parametrize("name", ["read_text", "read_csv", "read_json", "read_json_lines"])
def test_unreadable_files_are_one_line(core, tmp_path, name):
    read = getattr(core, name)
    with pytest.raises(SystemExit, match=r"^.*: Is a directory\.$"):
        read(tmp_path)
    with pytest.raises(SystemExit, match=r"^.*: No such file or directory\.$"):
        read(tmp_path / "none")
    (tmp_path / "gbk").write_bytes('["答案"]\n'.encode("gbk"))
    with pytest.raises(SystemExit, match=r"^.*gbk is damaged .*utf-8.*\): "):
        read(tmp_path / "gbk")


def test_a_csv_field_beyond_the_limit_is_one_line(core, tmp_path):
    (tmp_path / "x.csv").write_text("a," + "b" * 200_000)
    with pytest.raises(SystemExit, match=r"x\.csv is damaged \(field larger .*\): download"):
        core.read_csv(tmp_path / "x.csv")


def test_a_second_item_of_one_key_is_refused(core):
    items, _ = make_items(core, [1, 2])
    with pytest.raises(SystemExit, match="item law/1 is there 2 times"):
        core.select([*items, items[1]], None, None)
    with pytest.raises(SystemExit, match="the files are empty"):
        core.select([], None, None)


def test_the_progress_counts_selected_items_only(core, tiny_tokenizer, data, tmp_path, capsys):
    wrong = FakeModel(tiny_tokenizer, letter=lambda text: "A")
    run_here(core, wrong, tiny_tokenizer, data, tmp_path, "--subjects", "law")
    right = FakeModel(tiny_tokenizer)
    capsys.readouterr()
    run_here(core, right, tiny_tokenizer, data, tmp_path, "--subjects", "logic")
    assert "accuracy 100.00%" in (bar := capsys.readouterr().err) and "50.00%" not in bar


def test_a_header_that_was_cut_off_begins_anew(core, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"benchm')
    assert core.open_journal(tmp_path, {"benchmark": "x"}) == {}
    assert json.loads(path.read_text()) == {"benchmark": "x"}


def make_items(core, lengths, subject="law"):
    items = [core.Item(subject, str(i), "x" * n, "C", "STEM") for i, n in enumerate(lengths)]
    return items, {item.key: len(item.prompt) for item in items}


def test_batches_of_like_length_the_longest_first(core):
    items, lengths = make_items(core, [3, 9, 1, 8, 2])
    batches = core.make_batches(items, lengths, 2, "length")
    assert [[len(item.prompt) for item in batch] for batch in batches] == [[9, 8], [3, 2], [1]]


def test_batches_in_file_order_hold_one_subject(core):
    items = [core.Item(subject, str(i), "x", "C") for subject in SUBJECTS for i in range(3)]
    batches = core.make_batches(items, {}, 2, "file")
    assert [[item.key for item in batch] for batch in batches] == [
        batch for s in SUBJECTS for batch in ([f"{s}/0", f"{s}/1"], [f"{s}/2"])
    ]


def test_scores(core):
    items = [core.Item("a", str(i), "", "C", "STEM") for i in range(3)]
    items += [core.Item("b", "0", "", "C", "Others")]
    records = [{"correct": correct} for correct in (True, True, False, False)]
    results = core.score(items, records)
    assert results["accuracy"] == 50
    assert results["subjects"] == {"a": pytest.approx(200 / 3), "b": 0}
    assert results["categories"] == {"STEM": pytest.approx(200 / 3), "Others": 0}
    equal = core.score(items, records, weigh_subjects_equally=True)
    assert equal["accuracy"] == pytest.approx(100 / 3)
    assert core.format_table({"model": "a/b", **results}).splitlines() == [
        "| Model | Average | STEM | Others |",
        "| --- | --- | --- | --- |",
        "| b | 50.00 | 66.67 | 0.00 |",
    ]
    bare = core.format_table({"model": "b", "accuracy": 50, "categories": {}})
    assert bare.startswith("| Model | Accuracy |\n")


def test_a_stop_text_ends_generation_and_is_cut_off(core, tiny_model, tiny_tokenizer):
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("你好", "讲个笑话", "thank you")]
    whole = core.generate(tiny_model, tiny_tokenizer, prompts)
    stop = whole[1][4:6]
    stopped = core.generate(tiny_model, tiny_tokenizer, prompts, stop=stop)
    assert stopped == [text.partition(stop)[0] for text in whole] != whole
    steps, forward = [], tiny_model.forward

    def count(*args, **kwargs):
        steps.append(1)
        return forward(*args, **kwargs)

    tiny_model.forward = count
    try:
        core.generate(tiny_model, tiny_tokenizer, prompts[1:2], stop=stop)
    finally:
        del tiny_model.forward
    assert len(steps) < len(tiny_tokenizer.encode(whole[1], add_special_tokens=False))


def test_prompts_beyond_the_context_are_told(core, tiny_tokenizer, data, tmp_path, capsys):
    model = FakeModel(tiny_tokenizer)
    model.config.seq_length = 20
    run_here(core, model, tiny_tokenizer, data, tmp_path, "--limit", "2")
    assert "prompts are longer than the model's context of 20 tokens" in capsys.readouterr().err


def test_a_missing_package_is_named(core, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        core.load_hub("cais/mmlu", "all", "test")
