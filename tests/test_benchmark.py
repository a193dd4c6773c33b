"""The benchmark: random weights, what is measured and in which order, tables, plot, errors."""

import argparse
import json
import os
import sys
from importlib.util import find_spec

import benchmark
import benchmark_model
import benchmark_report
import pytest
import torch
from benchmark_model import ModelWorker, create_random_model
from benchmark_worker import Worker, WorkerError
from conftest import ROOT
from memory import PeakMemory, read_memory

import utils
from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMQuantizationConfig,
    loading,
)
from chatglm2.quantization import QuantizedLinear

TINY = ["--config", str(ROOT / "resources" / "chatglm2-tiny"), "--threads", "1"]
RANDOM = ["--random-weights", *TINY]
CPU = torch.device("cpu")
FAKE = f"""
import sys, os
sys.path.insert(0, {str(ROOT / "evaluation")!r})
from benchmark_worker import serve

step_s = None

def load(step=None, fail=None, **settings):
    global step_s
    if fail == "exit":
        os._exit(3)
    if fail:
        raise SystemExit(fail)
    step_s = step
    print("this goes to stderr")
    return {{"load_s": 1.5, "weight_bytes": 4e9, "description": "fake"}}

def measure(context, prompt_tokens, new_tokens):
    return {{
        "first_token_s": step_s * prompt_tokens,
        "decode_s": step_s * (new_tokens - 1),
        "cache_bytes": 1e6,
        "memory_bytes": 5e9,
    }}

serve({{
    "load": load, "measure": measure, "load_reader": lambda **_: None, "read": lambda: 100e9,
    "make": lambda path: path, "check": lambda: "fake",
}})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that makes engines whose workers only speak the protocol."""
    file = tmp_path / "fake.py"
    file.write_text(FAKE)
    monkeypatch.setattr(benchmark, "MODEL_WORKER", file)

    def make(name, case_list=((0, 10, 11),), **settings):
        cases = [benchmark.make_case(*case) for case in case_list]
        return benchmark.Engine(name, [sys.executable, str(file)], settings, 1e9, cases)

    return make


def load_tiny(*flags) -> ModelWorker:
    """Return a worker in this process."""
    args = benchmark.parse_args([*RANDOM, *flags])
    config = benchmark_model.read_shape(args)
    engine = benchmark.plan_own("", args, config, benchmark.list_cases(args))
    worker = ModelWorker()
    worker.loaded = worker.load(**engine.settings)
    return worker


# Random weights.


@pytest.mark.parametrize("flags", [["--quantize", "4"], ["--quantize", "8"], []])
def test_random_weights_are_stored_as_wanted_and_stay_finite(flags):
    model = load_tiny(*flags).model
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == (4 * 4 if flags else 0)
    assert all(layer.bits == int(flags[1]) for layer in layers)
    assert model.get_output_embeddings().weight.dtype == (torch.float16 if flags else torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(100, 164)[None]).logits
    assert logits.isfinite().all() and 0.5 < logits.std() < 2


def test_no_float_model_is_made_on_the_way():
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    shape = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8}
    config = ChatGLMConfig(**shape, padded_vocab_size=4096, num_layers=16)
    before = read_memory("RssAnon")
    with PeakMemory() as memory:
        create_random_model(config, CPU, torch.float32, ChatGLMQuantizationConfig(bits=4))
    weights = 16 * 1024 * (4 * 1024 + 3 * 4096)  # 268 million, 1.1 GB in float32
    assert memory.peak - before < 0.75 * weights  # half a byte each


@pytest.mark.parametrize(
    ("bits", "gigabytes"), [(4, 2.86 + 0.53), (8, 5.71 + 0.53), (0, 4 * 5.71 + 2 * 0.53)]
)
def test_bytes_that_a_token_of_the_6b_model_reads(bits, gigabytes):
    """Counted by hand: the blocks, and the output layer in float16."""
    config = ChatGLMConfig(**benchmark_model.SHAPE_6B, quantization_bit=bits)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).float()
    assert benchmark_model.count_read_bytes(model) / 1e9 == pytest.approx(gigabytes, rel=0.003)


def test_every_model_argument_reaches_random_weights():
    """A new one must be heeded by `ModelWorker.load_random`, and then added here."""
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    known = {"model", "revision", "device", "dtype", "quantize", "threads"}
    known |= {"kv_cache_dtype", "quantize_output", "exact_prefill"}
    known |= {"num_gpus", "offload_folder", "adapter"}  # refused by check_args
    assert set(vars(parser.parse_args([]))) == known


# Measuring.


def test_measured_generation():
    worker = load_tiny("--quantize", "4")
    assert worker.loaded["weight_bytes"] == benchmark_model.count_read_bytes(worker.model)
    lengths = []
    worker.model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    figures = worker.measure(context=0, prompt_tokens=20, new_tokens=6)
    assert lengths == [20, 1, 1, 1, 1, 1]
    assert figures["cache_bytes"] == 2 * 4 * 2 * 32 * 4  # keys, values; layers, heads, size, bytes
    assert figures["decode_s"] > 0 and figures["first_token_s"] > 0
    assert "characters" not in figures
    lengths.clear()
    worker.measure(context=300, prompt_tokens=1, new_tokens=3)
    assert lengths == [1, 1, 1]  # nothing of the context is computed


def test_flags_of_a_quantized_model():
    flags = ["--quantize", "4", "--quantize-output", "--exact-prefill"]
    worker = load_tiny(*flags, "--kv-cache-dtype", "float16")
    assert worker.model.get_output_embeddings().bits == 8 and worker.model.base_model.exact_prefill
    assert (
        worker.measure(context=30, prompt_tokens=1, new_tokens=3)["cache_bytes"]
        == 2 * 4 * 2 * 32 * 2
    )
    assert worker.loaded["description"] == (
        "cpu, float32 with INT4 weights, INT8 output layer, exact prefill, cache float16"
    )
    official = load_tiny("--quantize", "4")
    less = 4096 * 256 - 4096 * 4  # a byte of each weight, but a scale for each row
    weight_bytes = [x.loaded["weight_bytes"] for x in (official, worker)]
    assert weight_bytes[0] - weight_bytes[1] == less


def test_a_checkpoint_is_saved_and_measured(tmp_path):
    load_tiny("--quantize", "4").save(str(tmp_path))
    args = benchmark.parse_args(["--model", str(tmp_path), *TINY[2:]])
    engine = benchmark.plan_own("", args, benchmark_model.read_shape(args), [{"x": 9}])
    assert engine.name == "int4"
    worker = ModelWorker()
    worker.load(**engine.settings)
    assert worker.measure(context=0, prompt_tokens=30, new_tokens=8)["characters"] > 0
    assert worker.draw_prompt(30)[0, :2].tolist() == worker.tokenizer.encode("")[:2]


def test_bandwidth():
    reader = benchmark_model.BandwidthWorker()
    reader.load(threads=1, device="cpu")
    assert 1e9 < reader.measure() < 1e12
    assert reader.rows.numel() * 8 == benchmark_model.READ_BYTES


class Recorder:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def ask(self, command, **case):
        self.calls.append((self.name, case["prompt_tokens"]))
        return {}


def test_engines_are_measured_in_turn():
    calls = []
    long, short = benchmark.make_case(0, 100, 2), benchmark.make_case(0, 50, 2)
    workers = {name: Recorder(name, calls) for name in "AB"}
    cases = {"A": [long, short], "B": [long]}
    rounds = benchmark.run_rounds(workers, cases, lambda: calls.append("read"), 2)
    assert [name for name, *_ in rounds] == ["", "A", "B", "", "A"] * 2
    assert calls[:2] == [("A", 16), ("B", 16)]  # to warm up
    assert calls[2:] == ["read", ("A", 100), ("B", 100), "read", ("A", 50)] * 2


def test_groups_fit_into_memory():
    engines = [
        benchmark.Engine(name, [], {}, size, [])
        for name, size in zip("RABCD", (4, 5, 20, 6, 4), strict=True)
    ]
    groups, left_out = benchmark.group_engines(engines, 14)
    assert [[engine.name for engine in group] for group in groups] == [["R", "A", "D"], ["R", "C"]]
    assert list(left_out) == ["B"] and "beside R" in left_out["B"]
    assert benchmark.group_engines(engines[:1], 1)[0] == [engines[:1]]
    assert len(benchmark.group_engines(engines, None)[0]) == 1


def measure_fakes(engines) -> dict:
    args, left_out = benchmark.parse_args([*RANDOM, "--rounds", "2"]), {}
    groups = [benchmark.measure_group(engines, args, left_out)]
    machine = {"processor": "P", "device": "cpu", "threads": 2, "versions": {"torch": "1"}}
    shape = {"num_layers": 28, "hidden_size": 4096}
    setting = {"model": "random weights", "shape": shape, "machine": machine, "rounds": 2}
    return setting | benchmark_report.summarize(groups) | {"left_out": left_out}


def test_figures(fake, capfd):
    cases = [(0, 10, 11), (1000, 1, 11)]
    report = measure_fakes(
        [fake("int4", cases, step=0.05), fake("slow", step=0.1), fake("bad", fail="no memory")]
    )
    assert "this goes to stderr" in capfd.readouterr().err
    assert report["read_bandwidth_gb_per_s"] == 100
    assert report["left_out"] == {"bad": "bad: no memory"}
    fast, slow = report["engines"]
    case, long = fast["cases"]
    assert case["tokens_per_s"] == pytest.approx(20) and len(case["tokens_per_s_rounds"]) == 2
    assert case["characters_per_s"] == pytest.approx(29)
    assert case["prompt_tokens_per_s"] == pytest.approx(20) and long["prompt_tokens_per_s"] is None
    assert case["read_gb_per_token"] == pytest.approx(4 + 0.001 * 15.5)  # weights, mean context
    assert case["fraction_of_bandwidth"] == pytest.approx(4.0155 / 0.05 / 100)
    assert long["read_gb_per_token"] == pytest.approx(4 + 0.001 * 1006.5)
    assert fast["memory_gb"] == 5 and "reference_is_faster" not in case
    assert slow["cases"][0]["reference_is_faster"] == pytest.approx({"decode": 2, "first_token": 2})


def test_rate_at_which_a_cache_is_read():
    cases = [
        {"read_gb_per_token": 3.0, "tokens_per_s": 20},
        {"read_gb_per_token": 3.5, "tokens_per_s": 16},
    ]
    assert benchmark_report.measure_cache_rate(cases) == pytest.approx(0.5 / (1 / 16 - 1 / 20))
    assert benchmark_report.measure_cache_rate(cases[:1]) is None


def test_memory_of_a_worker_is_not_its_parents(fake):
    ballast = bytearray(700_000_000)
    ballast[::4096] = bytes(len(ballast[::4096])).replace(b"\0", b"\1")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'evaluation')!r}); "
        "from benchmark_worker import serve, read_peak_memory; serve({'peak': read_peak_memory})"
    )
    with Worker("w", [sys.executable, "-c", code]) as worker:
        assert 1e6 < worker.ask("peak") < 3e8


def test_workers_that_fail(fake):
    with pytest.raises(WorkerError, match=r"^gone: its process ended \(exit code 3\)\.$"):
        measure_fakes([fake("gone", fail="exit")])
    with pytest.raises(WorkerError, match="cannot run"):
        Worker("none", ["/no/such/program"])


# The whole, tables, plot.


def test_whole_run(tmp_path, capsys):
    report_file = tmp_path / "report.json"
    flags = ["--quantize", "4", "--prompt-tokens", "20", "--new-tokens", "4", "--rounds", "1"]
    flags += ["--random-context", "64", "--json", str(report_file)]
    benchmark.main([*RANDOM, *flags])
    output = capsys.readouterr().out
    assert "| int4   |      20 |" in output and "| int4   |      65 |" in output
    report = json.loads(report_file.read_text())
    assert report["shape"]["num_layers"] == 4 and report["machine"]["threads"] == 1
    (engine,) = report["engines"]
    assert engine["memory_gb"] > 0.1 and engine["cases"][1]["context"] == 64
    benchmark.main(["--from-json", str(report_file)])
    assert capsys.readouterr().out == output


class InProcess:
    """Stands for `Worker`: the commands run here."""

    def __init__(self, name, command):
        self.worker = ModelWorker()

    __enter__, __exit__ = (lambda self: self), (lambda self, *exception: None)

    def ask(self, command, **arguments):
        return getattr(self.worker, command)(**arguments)


def test_original_tables_and_load_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "Worker", InProcess)
    for name, length in (("SPEED", 48), ("ENCODED", 40), ("GENERATED", 100)):
        monkeypatch.setattr(benchmark, f"{name}_LENGTH", length)
    args = benchmark.parse_args([*RANDOM, "--quantize", "4", "--rounds", "2"])
    config = benchmark_model.read_shape(args)
    tables = benchmark.measure_original_tables(args, config)
    assert list(tables["rows"]) == ["bfloat16", "int8", "int4"]
    load_time = benchmark.measure_load_time(args, config, tmp_path)
    assert len(load_time["rounds"]) == 2 and load_time["checkpoint"] == "int4"
    (checkpoint,) = tmp_path.iterdir()
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float16"
    written = checkpoint.stat().st_mtime_ns
    benchmark.measure_load_time(args, config, tmp_path)
    assert checkpoint.stat().st_mtime_ns == written  # made once
    report = {
        "model": "random weights",
        "shape": benchmark.describe_shape(config),
        "machine": benchmark.describe_machine(args),
    }
    benchmark_report.print_report(report | {"load_time": load_time, "original_tables": tables})
    output = capsys.readouterr().out
    assert "| FP16 / BF16 |" in output and "generating 100 tokens" in output
    assert "the first 35 keys and values are random" in output
    assert "A saved checkpoint (int4) is ready" in output


def test_plot(fake, tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    report = measure_fakes([fake("int4", step=0.05), fake("llama-q4_0", step=0.1)])
    benchmark_report.draw_plot(report, tmp_path / "plot.png")
    image = image_module.open(tmp_path / "plot.png").convert("RGB")
    counts = {color: number for number, color in image.getcolors(1 << 24)}

    def count(name):
        return counts[tuple(bytes.fromhex(benchmark_report.COLORS[name][1:]))]

    assert count("own") == pytest.approx(2 * count("other"), rel=0.02)  # half as fast


# Errors: one line.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*RANDOM, "--compare", "vllm"], "--compare 'vllm': there are int4, int8"),
        ([*RANDOM, "--compare", "llama-q4_0 --threads 1"], "there are int4"),
        (["--layers", "2"], "--layers 2 needs --random-weights"),
        (["--random-context", "9"], "--random-context 9 needs --random-weights"),
        ([*RANDOM, "--model", "x"], "--model x: leave it or --random-weights out"),
        ([*RANDOM, "--revision", "x"], "--revision x needs a model on the hub"),
        ([*RANDOM, "--adapter", "x"], "--adapter x needs the model it was trained on"),
        ([*RANDOM, "--rounds", "0"], "--rounds 0 measures nothing"),
        ([*RANDOM, "--num-gpus", "2"], "--num-gpus and --offload-folder: what is measured is one"),
        ([*RANDOM, "--offload-folder", "x"], "--num-gpus and --offload-folder: what is measured"),
        (["--random-weights", "--config", "/no/such"], "--config /no/such: .*give a config.json"),
        (["--from-json", "/no/such"], "--from-json /no/such: "),
        ([*RANDOM, "--compare", "llama-q8_0", "--llama-python", "/no/python"], "cannot run"),
        ([*RANDOM, "--llama-python", "/no/python"], "--llama-python /no/python needs --compare"),
    ],
)
def test_errors(flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        benchmark.main(flags)
    assert "\n" not in str(error.value)


def test_llama_is_missing():
    if find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed")
    with pytest.raises(SystemExit, match=r"no llama-cpp-python in .*--llama-python"):
        benchmark.main([*RANDOM, "--compare", "llama-q4_0"])


def test_no_memory(monkeypatch):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 1_000_000)
    with pytest.raises(SystemExit, match=r"needs 0.0 GB for float32 on cpu, 0.0 GB free"):
        load_tiny()


# llama.cpp.


def test_llama_engines():
    args = benchmark.parse_args(["--random-weights", "--random-context", "8191"])
    config = benchmark_model.read_shape(args)
    sizes = {
        name: benchmark.plan_llama(name, args, config, ROOT).needed - benchmark.PROCESS_BYTES
        for name in benchmark.LLAMA_ENGINES
    }
    assert sizes["llama-q4_0"] == pytest.approx(3.513e9, rel=1e-3)  # the size of such a file
    assert sizes["llama-q4_0-f16"] - sizes["llama-q4_0"] == 65024 * 4096 * (16 - 4.5) / 8
    engine = benchmark.plan_llama("llama-q8_0", args, config, ROOT)
    assert [case["context"] for case in engine.cases] == [0]  # its cache cannot be random
    assert engine.file["kind"] == engine.file["output_kind"] == "Q8_0"


def test_llama_runs(tmp_path):
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    try:
        benchmark.check_llama(python)
    except SystemExit as error:
        pytest.skip(f"{error} (environment variable LLAMA_PYTHON)")
    args = benchmark.parse_args([*RANDOM, "--llama-python", python])
    config = benchmark_model.read_shape(args)
    engine = benchmark.plan_llama("llama-q4_0-f16", args, config, tmp_path)
    settings = engine.settings | benchmark.make_file(engine)
    with Worker("llama", engine.command) as worker:
        load = worker.ask("load", **settings)
        figures = worker.ask("measure", **benchmark.make_case(0, 20, 5))
    assert load["weight_bytes"] == pytest.approx(engine.needed - benchmark.PROCESS_BYTES, rel=0.4)
    assert figures["decode_s"] > 0 and figures["cache_bytes"] == 2 * 4 * 2 * 32 * 2
