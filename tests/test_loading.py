"""`loading`: damaged checkpoints, device, dtype, memory, a line for each mistake."""

import json
import re
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from fake_devices import pretend_gpus
from loading import fail, fail_to_load, load
from transformers.utils import logging

from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMQuantizationConfig,
    ChatGLMTokenizer,
    loading,
    placement,
)
from chatglm2.json_files import read_config
from chatglm2.quantization import QuantizedLinear, get_quantization

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1815217640\n"
INDEX = b'{"metadata": {}, "weight_map": {"lm_head": "model-00001-of-00007.safetensors"}}'
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def change_config(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), "utf-8")


# Loading.


@pytest.mark.parametrize(
    ("flags", "chosen", "printed"),
    [(["--threads", 1], 3, "threads 1\n"), ([], 3, "threads 3\n"), ([], None, "")],
)
def test_load_model(tiny_checkpoint, monkeypatch, capsys, flags, chosen, printed):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: print("threads", n))
    monkeypatch.setattr(loading, "choose_threads", lambda: chosen)
    tokenizer, model = load(tiny_checkpoint, *flags)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    assert isinstance(model, ChatGLMForConditionalGeneration) and not model.training
    assert loading.describe("tiny", model) == "tiny, cpu, float32"
    captured = capsys.readouterr()
    assert captured.out == printed and "cpu, float32: " in captured.err.splitlines()[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_while_loading(tiny_checkpoint, capsys, bits):
    _, model = load(tiny_checkpoint, "--quantize", bits)
    assert f"cpu, float32 with INT{bits} weights: " in capsys.readouterr().err
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 16 and {layer.bits for layer in layers} == {bits}
    assert model.dtype == F32 and model.get_input_embeddings().weight.dtype == F16
    from_float16 = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(bits)
    for name, value in from_float16.float().state_dict().items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize(
    ("flags", "expected"), [([], None), (["--kv-cache-dtype", "float16"], F16)]
)
def test_quantized_checkpoint(int4_checkpoint, capsys, flags, expected):
    flags = ["--dtype", "bfloat16", "--quantize", 4, *flags]
    tokenizer, model = load(int4_checkpoint, *flags)
    assert "cpu, bfloat16 with INT4 weights: " in capsys.readouterr().err
    assert loading.describe("tiny", model) == "tiny, cpu, bfloat16 with INT4 weights"
    assert model.base_model.cache_dtype == expected
    assert model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]


@pytest.mark.parametrize("name", ["tiny_checkpoint", "int4_checkpoint"])
def test_output_layer_is_quantized(name, request, int4_checkpoint, tmp_path, capsys):
    flags = [] if name == "int4_checkpoint" else ["--quantize", 4]
    tokenizer, model = load(request.getfixturevalue(name), *flags, "--quantize-output")
    precision = "float32 with INT4 weights, INT8 output layer"
    assert f"{precision}: " in capsys.readouterr().err
    assert loading.name_precision(model) == precision
    assert model.get_output_embeddings().bits == 8
    size = sum(p.nbytes for p in model.parameters())
    quantization = get_quantization(model.config)
    counted = loading.count_weight_bytes(read_config(int4_checkpoint), F16, quantization)
    assert counted <= size <= counted * 1.01  # norms in float32
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert loading.name_precision(load(tmp_path)[1]) == precision


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("tiny_checkpoint", ["--revision", "v1.0"], "--revision v1.0 needs a model on the hub"),
        ("tiny_checkpoint", ["--quantize-output"], "--quantize-output rounds"),
        ("tiny_checkpoint", ["--quantize", 4], "CHATGLM_BACKEND is 'cuda', which cannot serve cpu"),
        ("int4_checkpoint", ["--quantize", 8], "is quantized to 4 bits already: "),
    ],
)
def test_flags_that_do_not_fit(name, flags, expected, request, monkeypatch):
    monkeypatch.setenv("CHATGLM_BACKEND", "cuda")
    flags = [*flags, "--device", "cpu"]
    assert expected in fail_to_load(request.getfixturevalue(name), *flags)


@pytest.mark.parametrize("keep_auto_map", [True, False])
def test_no_code_of_a_checkpoint_is_executed(checkpoint, keep_auto_map):
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (checkpoint / f"{name}.py").write_text(f"raise AssertionError('{name} was executed')")
    if not keep_auto_map:
        change_config(checkpoint, auto_map=None)
    assert type(load(checkpoint)[1]) is ChatGLMForConditionalGeneration


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"{", "is not valid JSON"),
        ("tokenizer.model", b"no tokenizer", "tokenizer"),
        ("tokenizer.model", LFS_POINTER, f"tokenizer.model ({len(LFS_POINTER)} bytes) is a Git L"),
        ("model.safetensors", LFS_POINTER, f"safetensors ({len(LFS_POINTER)} bytes) is a Git LFS"),
        ("model.safetensors", 5000, "model.safetensors (5000 bytes) is truncated or damaged"),
        ("config.json", None, "it has no config.json"),
        ("tokenizer.model", None, "it has no tokenizer.model"),
        ("model.safetensors", None, "it has no weights"),
        ("model.safetensors.index.json", INDEX, "model-00001-of-00007.safetensors is missing"),
    ],
)
def test_damaged_or_missing_file(checkpoint, name, content, expected):
    """The content replaces the whole file; a number keeps this number of bytes."""
    file = checkpoint / name.removesuffix(".index.json")
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        kept = whole[:content] if isinstance(content, int) else content
        (checkpoint / name).write_bytes(kept)
    assert expected in fail_to_load(checkpoint)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama"}, "has model_type 'llama', not 'chatglm'"),
        ({"quantization_bit": 4}, "weights are not quantized, but its config says"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the model is quantized by gptq"),
        ({"ffn_hidden_size": 64}, "the weights do not belong to config.json: 8 tensors"),
        ({"num_layers": 5}, "num_layers is 5, and the weights have 4 layers"),
        ({"padded_vocab_size": 10**10}, "an integer from 1 to 16777216"),
    ],
)
def test_config_that_cannot_be_run(checkpoint, fields, expected):
    change_config(checkpoint, **fields)
    assert expected in fail_to_load(checkpoint)


def test_tokens_without_a_row(checkpoint):
    file = checkpoint / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"pad_token": "[PAD]"}), "utf-8")
    expected = "tokenizer_config.json has tokens with ids up to 4096, and padded_vocab_size"
    assert expected in fail_to_load(checkpoint)


def test_the_tokenizer_of_another_model(checkpoint, official_tokenizer):
    official_tokenizer.save_pretrained(checkpoint)
    assert "tokenizer.model has tokens with ids up to 64793, and " in fail_to_load(checkpoint)


def test_quantized_weights_whose_config_does_not_say_so(int4_checkpoint, tmp_path):
    folder = shutil.copytree(int4_checkpoint, tmp_path / "checkpoint")
    change_config(folder, quantization_bit=0, quantization_config=None)
    assert "the weights do not belong to config.json" in fail_to_load(folder)


# Device and dtype.

MACHINES = {  # number of GPUs, how many of the first have bfloat16, version of macOS
    "PC": (0, 0, 0),
    "two GPUs": (2, 2, 0),
    "an older GPU": (2, 1, 0),
    "old GPU": (1, 0, 0),
    "Mac 13": (0, 0, 13),
    "Mac 14": (0, 0, 14),
}
NO_BFLOAT16 = "does not support it: use --dtype float16"


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "own_dtype", "expected"),
    [
        ("PC", "auto", "auto", F16, "cpu, torch.float32: no GPU was found"),
        ("PC", "cpu", "float16", F16, "cpu, torch.float16: the device was requested, float16 was"),
        ("PC", "cpu", "float16", F16, "slow on a CPU"),
        ("PC", "cpu", "bfloat16", F16, "cpu, torch.bfloat16: "),
        ("PC", "cuda", "auto", F16, "--device cpu"),
        ("PC", "mps", "auto", F16, "--device cpu"),
        ("two GPUs", "auto", "auto", F16, "cuda:0, torch.float16: "),
        ("two GPUs", "auto", "auto", BF16, "cuda:0, torch.bfloat16: "),
        ("two GPUs", "auto", "auto", None, "cuda:0, torch.float16: "),
        ("two GPUs", "cuda", "float32", F16, "cuda:0, torch.float32: "),
        ("two GPUs", "cuda:1", "auto", F16, "cuda:1, torch.float16: "),
        ("two GPUs", "cpu", "auto", F16, "cpu, torch.float32: "),
        ("two GPUs", "cuda:2", "auto", F16, "--device cuda:2: the last GPU here is cuda:1"),
        ("two GPUs", "gpu", "auto", F16, "--device gpu: allowed are auto, cpu, cuda, cuda:N and"),
        ("two GPUs", "cuda:x", "auto", F16, "--device cuda:x: allowed are"),
        ("two GPUs", "cpu:1", "auto", F16, "--device cpu:1: allowed are"),
        ("an older GPU", "cuda:0", "auto", BF16, "cuda:0, torch.bfloat16: "),
        ("an older GPU", "cuda:1", "auto", BF16, "cuda:1, torch.float16: "),
        ("old GPU", "auto", "auto", BF16, "cuda:0, torch.float16: "),
        ("old GPU", "auto", "bfloat16", F16, f"--dtype bfloat16: cuda:0 {NO_BFLOAT16}"),
        ("Mac 13", "auto", "auto", F16, "mps, torch.float16: "),
        ("Mac 13", "auto", "auto", BF16, "no bfloat16"),
        ("Mac 13", "auto", "float32", F16, "mps, torch.float32: "),
        ("Mac 13", "mps", "bfloat16", F16, f"--dtype bfloat16: mps {NO_BFLOAT16}"),
        ("Mac 14", "auto", "auto", BF16, "mps, torch.bfloat16: "),
        ("Mac 14", "auto", "bfloat16", F16, "mps, torch.bfloat16: "),
    ],
)
def test_device_and_dtype(monkeypatch, machine, device, dtype, own_dtype, expected):
    num_gpus, num_bfloat16, macos = MACHINES[machine]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)

    def is_supported(including_emulation=True):
        return used[-1].index < num_bfloat16 or including_emulation

    used = []
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: nullcontext(used.append(gpu)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    mps = SimpleNamespace(is_available=lambda: macos > 0)
    mps.is_macos_or_newer = lambda major, minor: major <= macos
    monkeypatch.setattr(torch.backends, "mps", mps)
    try:
        chosen = loading.choose_device_and_dtype(device, dtype, own_dtype)
        line = "{}, {}: {}".format(*chosen)
    except SystemExit as error:
        line = error.code
    assert expected in line and "\n" not in line


# Several GPUs, and too small ones.


@pytest.fixture
def load_on_two_gpus(monkeypatch, tmp_path):
    """Load with the given flags, on two pretended GPUs with so many free bytes each."""
    monkeypatch.chdir(tmp_path)  # of offload folders
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def load_and_ask(folder, *flags, gpu=80e9, cpu=80e9):
        monkeypatch.setenv("CHATGLM_BACKEND", "torch")  # the others look at the real GPU
        free = {"cuda": gpu, "cpu": cpu}
        for module in (loading, placement):
            monkeypatch.setattr(module, "get_free_memory", lambda device: free[device.type])
        with pretend_gpus():
            tokenizer, model = load(folder, *flags, "--dtype", "float32")
            answer = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]
        return answer, Counter(str(p.device) for p in model.parameters())

    return load_and_ask


# The bundled model in float32: 8.4 MB, and four layers of 2.2 MB. Space for two is kept free.
OFFLOAD = ["--offload-folder", "x"]
ON_CPU = ["--device", "cpu"]


@pytest.mark.parametrize(
    ("name", "flags", "free", "layers"),
    [
        ("tiny", ["--num-gpus", 2], {}, "1 on cuda:0, 3 on cuda:1\n"),
        ("tiny", ["--num-gpus", 2, *OFFLOAD], {}, "1 on cuda:0, 3 on cuda:1\n"),
        ("tiny", ["--num-gpus", 2, "--quantize", 8], {}, "1 on cuda:0, 3 on cuda:1\n"),
        ("tiny", OFFLOAD, {"gpu": 16e6}, "1 on cuda:0, 3 in the CPU's memory (slow: each token"),
        (
            *("tiny", OFFLOAD, {"gpu": 16e6, "cpu": 9e6}),
            "1 on cuda:0, 2 in the CPU's memory, 1 on the disk (slow: each token",
        ),
        ("tiny", OFFLOAD + ON_CPU, {"cpu": 15.5e6}, "1 in the CPU's memory, 3 on the disk (slow"),
        ("int4", OFFLOAD + ON_CPU, {"cpu": 5.4e6}, "2 in the CPU's memory, 2 on the disk (slow"),
    ],
)
def test_division(
    request, load_on_two_gpus, tiny_model, tiny_tokenizer, capsys, name, flags, free, layers
):
    folder = request.getfixturevalue(f"{name}_checkpoint")
    answer, places = load_on_two_gpus(folder, *flags, **free)
    assert answer == tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]
    assert f", layers: {layers}" in capsys.readouterr().err
    assert (set(places) == {"cuda:0", "cuda:1"}) == (places["meta"] == 0) == ("slow" not in layers)
    assert Path("x").exists() <= ("slow" in layers)


@pytest.mark.parametrize(
    ("flags", "free", "expected"),
    [
        (["--num-gpus", 2], {"gpu": 10e6}, "its part on cuda:0 needs 0.0 GB, 0.0 GB free: use mor"),
        (["--num-gpus", 2, *ON_CPU], {}, "GPUs from cuda:0 on: leave out --device"),
        (["--num-gpus", 3], {}, "--num-gpus is 3, but the GPUs here are cuda:0 to cuda:1"),
        (["--offload-folder", __file__], {"gpu": 16e6}, "test_loading.py is a file: name a folder"),
        (OFFLOAD, {"gpu": 12e6}, "free on cuda:0, too little even for the embed"),
        ([*OFFLOAD, *ON_CPU, "--quantize", 4], {"cpu": 4.9e6}, "cannot be quantized while loading"),
        ([], {"gpu": 10e6}, "(the disk holds the rest: slow), or --num-gpus (there are 2)"),
    ],
)
def test_devices_that_cannot_hold_it(tiny_checkpoint, load_on_two_gpus, flags, free, expected):
    assert expected in fail(load_on_two_gpus, tiny_checkpoint, *flags, **free)


def test_copies_that_the_disk_cannot_hold(checkpoint, tiny_model, monkeypatch, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), checkpoint / "pytorch_model.bin")
    monkeypatch.setattr(placement, "get_free_memory", lambda device: 15.5e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    line = fail_to_load(checkpoint, *ON_CPU, "--offload-folder", tmp_path / "x")
    assert "have to be copied to --offload-folder" in line and "0.0 GB free: name a fol" in line


# Memory.

SHAPE_6B = {"add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2}
CONFIG = ChatGLMConfig(**SHAPE_6B)
INT4, INT8 = (ChatGLMQuantizationConfig(bits=bits) for bits in (4, 8))


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        (F32, None, 4 * 6_243_584_000),
        (F16, None, 2 * 6_243_584_000),
        (F16, INT8, 6_778_873_856),
        (F16, INT4, 3_923_601_408),
    ],
)
def test_the_official_model_is_counted(dtype, quantization, expected):
    assert placement.count_weight_bytes(CONFIG, dtype, quantization) == expected
    if quantization:
        output_layer = 65024 * 4096 - 65024 * 2  # a byte less for each weight, a scale for each row
        with_output = replace(quantization, output_bits=8)
        assert placement.count_weight_bytes(CONFIG, dtype, with_output) == expected - output_layer


@pytest.mark.parametrize(
    ("bit", "free", "dtype", "quantization", "expected"),
    [
        (
            *(0, 16e9, F32, None),
            "needs 25.5 GB for float32 on cpu, 16.0 GB free: use --dtype bfloat16 (needs 12.7 GB),"
            " or --quantize 4 (needs 4.0 GB), or a machine with more memory, or ",
        ),
        (0, 12e9, F32, None, "12.0 GB free: use --quantize 4 (needs 4.0 GB), or a machine"),
        (0, 6e9, F16, INT8, "6.9 GB for float16 with INT8 weights on cpu, 6.0 GB free: use --q"),
        (8, 5e9, F16, INT8, "6.9 GB for float16 with INT8 weights on cpu, 5.0 GB free: use a mac"),
        (0, 3e9, F32, INT4, "4.0 GB for float32 with INT4 weights on cpu, 3.0 GB free: use"),
        (0, 3e9, F32, None, "use a machine with more memory, or --offload-folder FOLDER (the disk"),
        (0, 26e9, F32, None, None),
        (0, 4.1e9, F32, INT4, None),
        (0, None, F32, None, None),  # unknown
    ],
)
def test_memory(monkeypatch, bit, free, dtype, quantization, expected):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: free)
    config = ChatGLMConfig(**SHAPE_6B, quantization_bit=bit)
    args = ("THUDM/chatglm2-6b", config, torch.device("cpu"), dtype, quantization)
    if expected:
        assert expected in fail(loading.check_memory, *args)
    else:
        loading.check_memory(*args)


def test_pointers_are_named_before_memory(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 1)
    assert "内存不足" in fail_to_load(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(LFS_POINTER)
    assert "Git LFS pointer" in fail_to_load(checkpoint)


OFFICIAL, SMALL = ChatGLMConfig(**SHAPE_6B), ChatGLMConfig(num_layers=1, padded_vocab_size=999)
SAVED_INT4 = ChatGLMConfig(**SHAPE_6B, quantization_bit=4)
ADVICE = "better add --quantize 4: 4.0 GB, ChatGLM2-6B generates 9.1 tokens/s on two CPU cores"


@pytest.mark.parametrize(
    ("config", "device", "quantization", "dtype", "expected"),
    [
        (OFFICIAL, "cpu", None, "auto", f"memory 25.5 GB, all of which.*{ADVICE}"),
        (OFFICIAL, "cpu", INT4, "auto", "memory 4.0 GB; ChatGLM2-6B generates 9.1 tokens/s on "),
        (SAVED_INT4, "cpu", INT4, "auto", "memory 4.0 GB; ChatGLM2-6B generates 9.1 tokens/s on "),
        (OFFICIAL, "cpu", INT8, "float32", "memory 6.9 GB; ChatGLM2-6B generates 6.6 tokens/s on "),
        (OFFICIAL, "cpu", None, "float32", "^$"),
        (OFFICIAL, "cpu", INT4, "bfloat16", "^$"),
        (OFFICIAL, "cuda", None, "auto", "^$"),
        (SMALL, "cpu", None, "auto", "^$"),
    ],
)
def test_memory_and_speed_are_announced(config, device, quantization, dtype, expected):
    text = loading.describe_cost(config, torch.device(device), quantization, dtype)
    assert re.search(expected, text)


def test_speeds_are_those_of_the_documentation():
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for bits, speed in loading.TOKENS_PER_S.items():
        assert re.search(rf"^\| INT{bits}\b.* \| {speed} \|", text, re.MULTILINE)


def test_progress_bars_are_for_terminals_only(tiny_checkpoint, capsys, monkeypatch):
    try:
        for is_terminal in (True, False):
            logging.enable_progress_bar()
            monkeypatch.setattr(sys.stderr, "isatty", lambda value=is_terminal: value)
            load(tiny_checkpoint)
            assert ("Loading weights" in capsys.readouterr().err) == is_terminal
    finally:
        logging.enable_progress_bar()
