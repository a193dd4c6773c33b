"""`loading`: damaged checkpoints, device, dtype, memory, a line for each mistake."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_devices import pretend_gpus
from loading import fail, fail_to_load, parse

import utils
from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMQuantizationConfig,
    ChatGLMTokenizer,
    loading,
    placement,
)
from chatglm2.checkpoint import read_config
from chatglm2.quantization import QuantizedLinear, get_quantization

ROOT = Path(__file__).parent.parent
CONFIG_6B = {
    "seq_length": 32768,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
}
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:cdf1bf57d519abe11043e9121314e76bc0934993e649a9e438a4b0894f4e6ee8\n"
    b"size 1815217640\n"
)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def change_config(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), "utf-8")


# Loading.


def test_load_model(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: print("threads", n))
    tokenizer, model = utils.load_model(parse("--model", str(tiny_checkpoint), "--threads", "1"))
    assert isinstance(tokenizer, ChatGLMTokenizer)
    assert isinstance(model, ChatGLMForConditionalGeneration) and not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    captured = capsys.readouterr()
    assert captured.out == "threads 1\n"
    assert "cpu, float32: " in captured.err.splitlines()[0]


@pytest.mark.parametrize("chosen", [3, None])
def test_without_flags_for_threads(tiny_checkpoint, monkeypatch, capsys, chosen):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: print("threads", n))
    monkeypatch.setattr(loading, "choose_threads", lambda: chosen)
    _, model = utils.load_model(parse("--model", str(tiny_checkpoint), "--dtype", "bfloat16"))
    assert capsys.readouterr().out == (f"threads {chosen}\n" if chosen else "")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_while_loading(tiny_checkpoint, capsys, bits):
    _, model = utils.load_model(parse("--model", str(tiny_checkpoint), "--quantize", str(bits)))
    assert f"cpu, float32 with INT{bits} weights: " in capsys.readouterr().err
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 16 and {layer.bits for layer in layers} == {bits}
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float16
    from_float16 = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(bits)
    for name, value in from_float16.float().state_dict().items():
        assert torch.equal(model.get_parameter(name), value), name


def test_quantized_checkpoint(int4_checkpoint, capsys):
    argv = ["--model", str(int4_checkpoint), "--dtype", "bfloat16", "--quantize", "4"]
    tokenizer, model = utils.load_model(parse(*argv))
    assert "cpu, bfloat16 with INT4 weights: " in capsys.readouterr().err
    assert (model.dtype, get_quantization(model.config).bits) == (torch.bfloat16, 4)
    assert model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]


def test_quantized_checkpoint_and_other_bits(int4_checkpoint):
    line = fail_to_load("--model", str(int4_checkpoint), "--quantize", "8")
    assert line.startswith(f"--quantize 8: {int4_checkpoint} is quantized to 4 bits already: ")


def test_quantized_weights_whose_config_does_not_say_so(int4_checkpoint, tmp_path):
    folder = shutil.copytree(int4_checkpoint, tmp_path / "checkpoint")
    change_config(folder, quantization_bit=0, quantization_config=None)
    assert "the weights do not belong to config.json" in fail_to_load("--model", str(folder))


@pytest.mark.parametrize("keep_auto_map", [True, False])
def test_no_code_of_a_checkpoint_is_executed(checkpoint, keep_auto_map):
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (checkpoint / f"{name}.py").write_text(f"raise AssertionError('{name} was executed')")
    if not keep_auto_map:
        change_config(checkpoint, auto_map=None)
    _, model = utils.load_model(parse("--model", str(checkpoint)))
    assert type(model) is ChatGLMForConditionalGeneration


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"{", "not a valid JSON file"),
        ("tokenizer.model", b"no tokenizer", "tokenizer"),
        ("tokenizer.model", LFS_POINTER, f"tokenizer.model ({len(LFS_POINTER)} bytes) is a Git L"),
        ("model.safetensors", LFS_POINTER, f"safetensors ({len(LFS_POINTER)} bytes) is a Git LFS"),
        ("model.safetensors", 5000, "model.safetensors (5000 bytes) is truncated or damaged"),
        ("config.json", None, "it has no config.json"),
        ("tokenizer.model", None, "it has no tokenizer.model"),
        ("model.safetensors", None, "it has no weights"),
    ],
)
def test_damaged_or_missing_file(checkpoint, name, content, expected):
    if content is None:
        (checkpoint / name).unlink()
    elif isinstance(content, int):
        os.truncate(checkpoint / name, content)
    else:
        (checkpoint / name).write_bytes(content)
    assert expected in fail_to_load("--model", str(checkpoint))


def test_missing_shard(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head": "model-00001-of-00007.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00007.safetensors is missing" in fail_to_load("--model", str(checkpoint))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama"}, "is a model of type 'llama'"),
        ({"quantization_bit": 4}, "weights are not quantized, but its config says"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the model is quantized by gptq"),
        ({"ffn_hidden_size": 64}, "the weights do not belong to config.json: 8 tensors"),
        ({"num_layers": 5}, "transformer.encoder.layers.4.input_layernorm.weight"),
    ],
)
def test_config_that_cannot_be_run(checkpoint, fields, expected):
    change_config(checkpoint, **fields)
    assert expected in fail_to_load("--model", str(checkpoint))


def test_a_file_is_no_folder(tiny_checkpoint):
    line = fail_to_load("--model", str(tiny_checkpoint / "config.json"))
    assert "config.json is a file: give the checkpoint folder" in line


def test_revision_of_a_folder(tiny_checkpoint):
    line = fail_to_load("--model", str(tiny_checkpoint), "--revision", "v1.0")
    assert line.startswith("--revision v1.0 needs a model on the hub")


# Device and dtype.


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_dtype_on_a_cpu(dtype, expected):
    device, chosen, reason = loading.choose_device_and_dtype("cpu", dtype, torch.float16)
    assert (device, chosen) == (torch.device("cpu"), expected)
    assert ("slow on a CPU" in reason) == (dtype == "float16")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "dtype", "checkpoint_dtype", "expected"),
    [
        ("auto", "auto", torch.float16, ("cuda:0", torch.float16)),
        ("auto", "auto", torch.bfloat16, ("cuda:0", torch.bfloat16)),
        ("auto", "auto", None, ("cuda:0", torch.float16)),
        ("cuda", "float32", torch.float16, ("cuda:0", torch.float32)),
        ("cuda:1", "auto", torch.float16, ("cuda:1", torch.float16)),
        ("cpu", "auto", torch.float16, ("cpu", torch.float32)),
    ],
)
def test_choice_with_gpus(device, dtype, checkpoint_dtype, expected):
    chosen_device, chosen_dtype, _ = loading.choose_device_and_dtype(
        device, dtype, checkpoint_dtype
    )
    assert (str(chosen_device), chosen_dtype) == expected


@pytest.mark.usefixtures("two_gpus")
def test_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    _, dtype, reason = loading.choose_device_and_dtype("auto", "auto", torch.bfloat16)
    assert dtype == torch.float16 and "no bfloat16" in reason

    assert "--dtype float16" in fail(loading.choose_device_and_dtype, "auto", "bfloat16", None)


@pytest.mark.parametrize(
    ("macos", "dtype", "checkpoint_dtype", "expected"),
    [
        (13, "auto", torch.float16, torch.float16),
        (13, "auto", torch.bfloat16, torch.float16),
        (14, "auto", torch.bfloat16, torch.bfloat16),
        (14, "bfloat16", torch.float16, torch.bfloat16),
        (13, "float32", torch.float16, torch.float32),
    ],
)
def test_auto_takes_mps_before_the_cpu(monkeypatch, macos, dtype, checkpoint_dtype, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= macos
    )
    device, chosen, _ = loading.choose_device_and_dtype("auto", dtype, checkpoint_dtype)
    assert (device.type, chosen) == ("mps", expected)
    if macos < 14:
        line = fail(loading.choose_device_and_dtype, "mps", "bfloat16", None)
        assert "--dtype bfloat16: mps does not support it: use --dtype float16" in line


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:2", "the last GPU here is cuda:1"),
        ("gpu", "allowed are auto, cpu, cuda, cuda:N and mps"),
        ("cuda:x", "allowed are"),
        ("cpu:1", "allowed are"),
    ],
)
def test_unknown_device(device, expected):
    line = fail(loading.choose_device, device)
    assert f"--device {device}: " in line and expected in line


def test_absent_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device cpu" in fail(loading.choose_device, "cuda")
    assert "--device cpu" in fail(loading.choose_device, "mps")


@pytest.mark.parametrize("is_quantized", [True, False])
def test_output_layer_is_quantized(
    is_quantized, int4_checkpoint, tiny_checkpoint, tmp_path, capsys
):
    flags = ["--model", str(int4_checkpoint)]
    if not is_quantized:
        flags = ["--model", str(tiny_checkpoint), "--quantize", "4"]
    _, model = utils.load_model(parse(*flags, "--quantize-output"))
    assert "float32 with INT4 weights, INT8 output layer: " in capsys.readouterr().err
    assert loading.name_precision(model) == "float32 with INT4 weights, INT8 output layer"
    layer = model.get_output_embeddings()
    assert isinstance(layer, QuantizedLinear) and layer.bits == 8
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    counted = loading.count_weight_bytes(
        read_config(int4_checkpoint), torch.float16, get_quantization(model.config)
    )
    assert counted <= size <= counted * 1.01  # norms in float32
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_checkpoint / "tokenizer.model", tmp_path)
    shutil.copy(tiny_checkpoint / "tokenizer_config.json", tmp_path)
    _, again = utils.load_model(parse("--model", str(tmp_path)))
    assert loading.name_precision(again) == loading.name_precision(model)


def test_output_layer_alone_is_not_quantized():
    line = fail_to_load("--model", "resources/chatglm2-tiny", "--quantize-output")
    assert line.startswith("--quantize-output rounds") and "add --quantize 4 or" in line


def test_settings_arrive(int4_checkpoint):
    for flags, expected in (
        ([], (None, False)),
        (["--kv-cache-dtype", "float16", "--exact-prefill"], (torch.float16, True)),
    ):
        model = utils.load_model(parse("--model", str(int4_checkpoint), *flags))[1].base_model
        assert (model.cache_dtype, model.exact_prefill) == expected


# Several GPUs, and too small ones.


@pytest.fixture
def load_on_two_gpus(monkeypatch, two_gpus):
    """Load with the given flags, on two pretended GPUs with so many free bytes each."""

    def load(*argv, gpu=80e9, cpu=80e9):
        monkeypatch.setenv("CHATGLM_BACKEND", "torch")  # the others look at the real GPU
        free = {"cuda": gpu, "cpu": cpu}
        for module in (loading, placement):
            monkeypatch.setattr(module, "get_free_memory", lambda device: free[device.type])
        with pretend_gpus():
            tokenizer, model = utils.load_model(parse(*argv, "--dtype", "float32"))
            answer = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]
        return answer, Counter(str(p.device) for p in model.parameters())

    return load


@pytest.fixture(scope="module")
def first_answer(tiny_model, tiny_tokenizer):
    return tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=4)[0]


@pytest.mark.parametrize("argv", [[], ["--offload-folder", "unused"]])
def test_num_gpus(load_on_two_gpus, tiny_checkpoint, first_answer, capsys, argv):
    answer, places = load_on_two_gpus("--model", str(tiny_checkpoint), "--num-gpus", "2", *argv)
    assert answer == first_answer and set(places) == {"cuda:0", "cuda:1"}
    assert ", layers: 1 on cuda:0, 3 on cuda:1\n" in capsys.readouterr().err
    assert not Path("unused").exists()


def test_num_gpus_while_quantizing(load_on_two_gpus, tiny_checkpoint):
    _, places = load_on_two_gpus(
        "--model", str(tiny_checkpoint), "--num-gpus", "2", "--quantize", "8"
    )
    assert set(places) == {"cuda:0", "cuda:1"}


# The bundled model in float32: 8.4 MB, and four blocks of 2.2 MB. Two of them are kept free.


@pytest.mark.parametrize(
    ("argv", "free", "expected"),
    [
        ([], (16e6, 80e6), "layers: 1 on cuda:0, 3 in the CPU's memory (slow: each token"),
        ([], (16e6, 9e6), "layers: 1 on cuda:0, 2 in the CPU's memory, 1 on the disk (slow"),
        (
            ["--device", "cpu"],
            (0, 15.5e6),
            "layers: 1 in the CPU's memory, 3 on the disk (slow: each tok",
        ),
    ],
)
def test_offload(
    load_on_two_gpus, tiny_checkpoint, first_answer, capsys, tmp_path, argv, free, expected
):
    argv = ["--model", str(tiny_checkpoint), "--offload-folder", str(tmp_path), *argv]
    answer, places = load_on_two_gpus(*argv, gpu=free[0], cpu=free[1])
    assert answer == first_answer and places["meta"]
    assert expected in capsys.readouterr().err


def test_offload_of_a_quantized_checkpoint(load_on_two_gpus, int4_checkpoint, capsys, tmp_path):
    argv = ["--model", str(int4_checkpoint), "--offload-folder", str(tmp_path)]
    answer, _ = load_on_two_gpus(*argv, "--device", "cpu", cpu=5.4e6)
    assert "layers: 2 in the CPU's memory, 2 on the disk" in capsys.readouterr().err
    expected, _ = load_on_two_gpus("--model", str(int4_checkpoint), "--device", "cpu")
    assert answer == expected


@pytest.mark.parametrize(
    ("argv", "free", "expected"),
    [
        (
            ["--num-gpus", "2"],
            (10e6, 0),
            "its part on cuda:0 needs 0.0 GB, 0.0 GB free: use more GPUs",
        ),
        (["--num-gpus", "2", "--device", "cpu"], (0, 0), "GPUs from cuda:0 on: leave out --device"),
        (["--num-gpus", "3"], (0, 0), "--num-gpus is 3, but the GPUs here are cuda:0 to cuda:1"),
        (["--offload-folder", __file__], (16e6, 80e6), "test_loading.py is a file: name a folder"),
        (["--offload-folder", "x"], (12e6, 80e6), "free on cuda:0, too little even for the embed"),
        (
            ["--offload-folder", "x", "--device", "cpu", "--quantize", "4"],
            (0, 4.9e6),
            "layers on the disk cannot be quantized while loading: load a checkpoint that was sav",
        ),
        ([], (10e6, 80e6), "FOLDER (the disk holds the rest: slow), or --num-gpus (there are 2)"),
    ],
)
def test_devices_that_cannot_hold_it(tiny_checkpoint, load_on_two_gpus, argv, free, expected):
    argv = ["--model", str(tiny_checkpoint), *argv]
    line = fail(partial(load_on_two_gpus, gpu=free[0], cpu=free[1]), *argv)
    assert expected in line


def test_copies_that_the_disk_cannot_hold(checkpoint, tiny_model, monkeypatch, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), checkpoint / "pytorch_model.bin")
    monkeypatch.setattr(placement, "get_free_memory", lambda device: 15.5e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    argv = ["--model", str(checkpoint), "--device", "cpu", "--offload-folder", str(tmp_path / "x")]
    line = fail_to_load(*argv)
    assert "have to be copied to --offload-folder" in line and "0.0 GB free: name a fol" in line


# Memory.

CONFIG = ChatGLMConfig(**CONFIG_6B)
CPU = torch.device("cpu")
INT4, INT8 = (ChatGLMQuantizationConfig(bits=bits) for bits in (4, 8))


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        (torch.float32, None, 4 * 6_243_584_000),
        (torch.float16, None, 2 * 6_243_584_000),
        (torch.float16, INT8, 6_778_873_856),
        (torch.float16, INT4, 3_923_601_408),
    ],
)
def test_the_official_model_is_counted(dtype, quantization, expected):
    count = partial(placement.count_weight_bytes, dtype=dtype)
    assert count(CONFIG, quantization=quantization) == expected
    if quantization:
        output_layer = 65024 * 4096 - 65024 * 2  # a byte less for each weight, a scale for each row
        with_output = replace(quantization, output_bits=8)
        assert count(CONFIG, quantization=with_output) == expected - output_layer
        config = ChatGLMConfig(**CONFIG_6B, quantization_bit=quantization.bits)
        assert count(config, quantization=get_quantization(config)) == expected


@pytest.mark.parametrize(
    ("free", "dtype", "quantization", "expected"),
    [
        (
            *(16e9, torch.float32, None),
            "needs 25.5 GB for float32 on cpu, 16.0 GB free: use --dtype bfloat16 (needs 12.7 GB),"
            " or --quantize 4 (needs 4.0 GB), or a machine with more memory, or ",
        ),
        (12e9, torch.float32, None, "12.0 GB free: use --quantize 4 (needs 4.0 GB), or a machine"),
        (6e9, torch.float16, INT8, "6.9 GB for float16 with INT8 weights on cpu, 6.0 GB free: use"),
        (3e9, torch.float32, INT4, "4.0 GB for float32 with INT4 weights on cpu, 3.0 GB free: use"),
        (
            *(3e9, torch.float32, None),
            "25.5 GB for float32 on cpu, 3.0 GB free: use a machine with more memory, or --offload"
            "-folder FOLDER (the disk holds the rest: slow), or the bundled",
        ),
    ],
)
def test_too_little_memory(monkeypatch, free, dtype, quantization, expected):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: free)
    line = fail(loading.check_memory, "THUDM/chatglm2-6b", CONFIG, CPU, dtype, quantization)
    assert expected in line


def test_a_quantized_checkpoint_cannot_be_quantized_further(monkeypatch):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 5e9)
    config = ChatGLMConfig(**CONFIG_6B, quantization_bit=8)
    line = fail(loading.check_memory, "me/int8", config, CPU, torch.float16, INT8)
    assert "needs 6.9 GB" in line and "--quantize" not in line


@pytest.mark.parametrize(("free", "quantization"), [(26e9, None), (4.1e9, INT4), (None, None)])
def test_enough_or_unknown_memory(monkeypatch, free, quantization):
    monkeypatch.setattr(loading, "get_free_memory", lambda device: free)
    loading.check_memory("model", CONFIG, CPU, torch.float32, quantization)


def test_memory_is_checked_before_loading(checkpoint, monkeypatch):
    change_config(checkpoint, padded_vocab_size=10**9)
    monkeypatch.setattr(loading, "get_free_memory", lambda device: 10**9)
    assert "GB for float32" in fail_to_load("--model", str(checkpoint))


def test_backend_that_cannot_serve(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("CHATGLM_BACKEND", "cuda")
    error = fail_to_load("--model", str(tiny_checkpoint), "--quantize", "4", "--device", "cpu")
    assert "CHATGLM_BACKEND is 'cuda', which cannot serve cpu in float32" in error


def test_description(tiny_model, int4_checkpoint):
    assert loading.describe("tiny", tiny_model) == "tiny, cpu, float32"
    quantized = ChatGLMForConditionalGeneration.from_pretrained(int4_checkpoint)
    assert loading.describe("tiny", quantized) == "tiny, cpu, float16 with INT4 weights"
