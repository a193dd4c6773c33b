"""The benchmark: random weights, what is measured and in which order, figures, errors."""

import json
import shlex
import subprocess
import sys

import benchmark
import benchmark_model
import pytest
import torch
from benchmark import Worker, WorkerError
from conftest import ROOT
from loading import fail

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, loading
from chatglm2.quantization import QuantizedLinear

TINY = str(ROOT / "resources" / "chatglm2-tiny")
RANDOM = ["--random-weights", "--model", TINY, "--threads", "1"]
SHORT = ["--prompt-tokens", "20", "--new-tokens", "4", "--rounds", "1"]


def load(*flags) -> benchmark_model.Worker:
    """Return a worker in this process."""
    worker = benchmark_model.Worker()
    worker.loaded = worker.load(**vars(benchmark.parse_args(["--threads", "1", *flags])))
    return worker


class InProcess:
    """Replaces `Worker`: the methods run in this process."""

    def __init__(self, name, module):
        self.name, self.worker = name, benchmark_model.Worker()

    __enter__, __exit__ = (lambda self: self), (lambda self, *exception: None)

    def close(self):
        pass

    def ask(self, method, **arguments):
        try:
            result = getattr(self.worker, method)(**arguments)
        except SystemExit as error:
            raise WorkerError(f"{self.name}: {error}") from error
        return result | {"memory_bytes": 5e9}


# Random weights.


@pytest.mark.parametrize("flags", [["--quantize", "4"], ["--quantize", "8"], []])
def test_random_weights_are_quantized_as_requested_and_stay_finite(flags):
    worker = load(*RANDOM, *flags)
    model = worker.model
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == (4 * 4 if flags else 0)
    assert worker.loaded["name"] == (f"int{flags[1]}" if flags else "float32")
    assert model.get_output_embeddings().weight.dtype == (torch.float16 if flags else torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(100, 164)[None]).logits
    assert logits.isfinite().all() and 0.5 < logits.std() < 2


def test_flags_of_a_quantized_model():
    flags = ["--quantize", "4", "--quantize-output"]
    worker = load(*RANDOM, *flags, "--kv-cache-dtype", "float16")
    assert worker.model.get_output_embeddings().bits == 8
    figures = worker.measure(prompt_tokens=30, new_tokens=3)
    assert figures["cache_bytes"] == 2 * 4 * 2 * 32 * 2  # keys, values; layers, heads, size, bytes
    assert worker.loaded["description"] == (
        "cpu, float32 with INT4 weights, INT8 output layer, cache float16"
    )
    official = load(*RANDOM, "--quantize", "4")
    less = 4096 * 256 - 4096 * 4  # a byte of each weight, but a scale for each row
    assert official.loaded["weight_bytes"] - worker.loaded["weight_bytes"] == less


@pytest.mark.parametrize(
    ("bits", "gigabytes"), [(4, 2.86 + 0.53), (8, 5.71 + 0.53), (0, 4 * 5.71 + 2 * 0.53)]
)
def test_bytes_that_a_token_of_the_6b_model_reads(bits, gigabytes):
    """Counted by hand: the layers, and the output layer in float16."""
    config = ChatGLMConfig(**benchmark_model.SHAPE_6B, quantization_bit=bits)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).float()
    assert benchmark_model.count_read_bytes(model) / 1e9 == pytest.approx(gigabytes, rel=0.003)


# Measuring.


def test_a_measurement_generates_after_a_prompt():
    worker, lengths = load("--model", TINY), []
    worker.model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    figures = worker.measure(prompt_tokens=20, new_tokens=6)
    assert lengths == [20, 1, 1, 1, 1, 1]
    assert min(figures[name] for name in ("first_token_s", "decode_s", "characters")) > 0
    assert worker.draw_prompt(30)[0, :2].tolist() == worker.tokenizer.encode("")[:2]


def test_bandwidth(monkeypatch):
    monkeypatch.setattr(benchmark_model, "READ_S", 0)
    assert 1e9 < benchmark_model.BandwidthReader(benchmark.parse_args(RANDOM)).read() < 1e12


class FakeWorker:
    load = {"load_s": 1.5, "weight_bytes": 4e9, "description": "fake"}

    def __init__(self, name, step_s, calls):
        self.name, self.step_s, self.calls = name, step_s, calls

    def ask(self, method, prompt_tokens, new_tokens):
        self.calls.append((self.name, prompt_tokens))
        return {
            "first_token_s": self.step_s * prompt_tokens,
            "decode_s": self.step_s * (new_tokens - 1),
            "cache_bytes": 1e6,
            "memory_bytes": 5e9,
        }


def test_engines_are_measured_in_turn():
    calls = []
    workers = [FakeWorker("A", 0.05, calls), FakeWorker("B", 0.1, calls)]
    cases = [{"prompt_tokens": n, "new_tokens": 11} for n in (100, 10)]
    found = benchmark.run_rounds(workers, cases, lambda: calls.append("read") or 100e9, 2)
    assert calls[:2] == [("A", 16), ("B", 16)]  # to warm up
    assert calls[2:] == ["read", ("A", 100), ("B", 100), "read", ("A", 10), ("B", 10)] * 2

    engine = benchmark.summarize(workers[1], cases, found[1], reference=found[0])
    _, short = engine["cases"]
    assert [short[name] for name in ("tokens_per_s", "prompt_tokens_per_s")] == [10, 10]
    assert short["characters_per_s"] == pytest.approx(14.5)
    assert short["read_gb_per_token"] == pytest.approx(4 + 0.001 * 15.5)  # weights, mean context
    assert short["fraction_of_bandwidth"] == pytest.approx(4.0155 / 0.1 / 100)
    assert short["reference_is_faster"] == pytest.approx({"decode": 2, "first_token": 2})
    assert engine["memory_gb"] == 5


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(benchmark, "Worker", InProcess)
    monkeypatch.setattr(benchmark_model, "READ_S", 0)


def test_the_report(in_process, tmp_path, capsys):
    file, engines = tmp_path / "report.json", ["int8", "int4 --quantize-output"]
    flags = ["--quantize", "4", "--compare", *engines, "--json", str(file)]
    benchmark.main([*RANDOM, *SHORT, *flags])
    output, report = capsys.readouterr().out, json.loads(file.read_text("utf-8"))
    assert [engine["name"] for engine in report["engines"]] == ["int4", *engines]
    assert len(report["engines"][0]["cases"][0]["tokens_per_s_rounds"]) == 2  # one beside each
    assert report["shape"]["num_layers"] == 4 and report["machine"]["threads"] == 1
    assert "| int4 " in output and "int4 is faster" in output and "1.45 for each token" in output


def test_an_engine_that_cannot_be_loaded_is_left_out(in_process, int4_checkpoint, capsys):
    flags = ["--model", str(int4_checkpoint), *SHORT, "--compare", "int8", "bfloat16"]
    benchmark.main(flags)
    output = capsys.readouterr().out
    assert "left out: int8: --quantize 8: " in output
    assert "left out: bfloat16: the checkpoint has int4 weights" in output


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    cases = [{"tokens_per_s": 10, "prompt_tokens_per_s": 20}]
    report = {"engines": [{"name": name, "cases": cases} for name in ("int4", "llama-q4_0-f16")]}
    benchmark.draw_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_random_weights_are_never_floats_on_the_way(tmp_path):
    shape = {"hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16}
    ChatGLMConfig(**shape, padded_vocab_size=4096, num_layers=6).save_pretrained(tmp_path)
    words = [sys.executable, "evaluation/benchmark.py", *RANDOM, "--model", str(tmp_path), *SHORT]
    words += ["--quantize", "4", "--compare", "int8", "--json", str(tmp_path / "report.json")]
    subprocess.run(words, cwd=ROOT, check=True)
    engines = json.loads((tmp_path / "report.json").read_text("utf-8"))["engines"]
    weights_gb = 6 * 2048 * (4 * 2048 + 3 * 8192) / 1e9  # in int8; 1.6 in float32
    assert all(engine["memory_gb"] < 1 + weights_gb for engine in engines)


# Processes.


ENGINE = """
import os, sys
class Worker:
    def measure(self):
        is_stdout_free = os.path.sameopenfile(1, 2)  # for the report
        return {"torch": "torch" in sys.modules, "is_stdout_free": is_stdout_free}
    def fail(self):
        raise ValueError("no\\n memory")
    def end(self):
        os._exit(3)
"""


def test_a_worker_is_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    ballast = bytearray(700_000_000)
    ballast[::4096] = b"\1" * len(ballast[::4096])
    with Worker("w", "engine") as worker:
        figures = worker.ask("measure")
        assert 1e6 < figures["memory_bytes"] < 3e8 and not figures["torch"]
        assert figures["is_stdout_free"]
        with pytest.raises(WorkerError, match=r"^w: no memory$"):
            worker.ask("fail")
        with pytest.raises(WorkerError, match=r"^w: its process ended \(exit code 3\)\.$"):
            worker.ask("end")


# Errors: one line.


ONE_DEVICE = "--num-gpus and --offload-folder: the benchmark measures one device"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compare vllm", "--compare 'vllm': there are int4, int8"),
        ("--compare 'llama-q4_0-f16 --threads 1'", "there are int4, int8"),
        ("--revision x", "--revision x: leave it or --random-weights out"),
        ("--adapter x", "--adapter x: leave it or --random-weights out"),
        ("--num-gpus 2", ONE_DEVICE),
        ("--offload-folder x", ONE_DEVICE),
        ("--model /no/such", "--model /no/such: "),
        ("--compare llama-q4_0-f16", "pip install llama-cpp-python gguf"),
        ("--plot x", "--plot x needs matplotlib, which is not in requirements"),
    ],
)
def test_errors_are_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert message in fail(benchmark.main, [*RANDOM, *shlex.split(flags)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "llama-q8_0-q8_0"], "keeps its output layer: give llama-q8_0-f16"),
        (["--compare", "llama-q8_0-f16", "--adapter", "x"], "llama.cpp gets no --adapter"),
    ],
)
def test_what_llama_cannot_have_of_a_checkpoint(flags, message, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    assert message in fail(benchmark.main, ["--model", TINY, *flags])


def test_no_memory(monkeypatch):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 1_000_000)
    assert "needs 0.0 GB for float32 on cpu, 0.0 GB free" in fail(load, *RANDOM)


# llama.cpp.


@pytest.mark.parametrize("flags", [RANDOM, ["--model", TINY, "--threads", "1"]], ids=len)
def test_llama(flags, tmp_path):
    for name in ("llama_cpp", "gguf"):
        pytest.importorskip(name, reason="needs llama-cpp-python and gguf", exc_type=ImportError)
    args = benchmark.parse_args(flags)
    shape = benchmark_model.describe_setting(args)["shape"]
    with benchmark.start_engine("llama-q4_0-f16", args, shape, tmp_path) as worker:
        figures = worker.ask("measure", prompt_tokens=20, new_tokens=5)
    layers = 4 * 256 * (2 * 256 + 2 * 2 * 32 + 3 * 512) * 4.5 / 8  # weights of 4.5 bits
    assert worker.load["weight_bytes"] == pytest.approx(layers + 2 * 4096 * 256, rel=0.05)
    assert figures["decode_s"] > 0 and figures["cache_bytes"] == 2 * 4 * 2 * 32 * 2
