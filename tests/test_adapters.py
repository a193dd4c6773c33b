"""Adapters with random weights, against PEFT and the original's way."""

import asyncio
import json
import random
import shutil
import sys
import time
from collections import Counter
from itertools import product

import loading
import pytest
import torch
from loading import parse
from safetensors.torch import load_file, save_file
from servers import gather_answers
from torch.testing import assert_close

import utils
from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, placement
from chatglm2.adapters import UNUSED, load_adapter, read_adapter
from chatglm2.chat.conversation import Conversation
from chatglm2.quantization import QuantizedLinear
from chatglm2.serving.batching import Batcher, Request

TARGETS = ["query_key_value", "dense_h_to_4h"]
PREFIX_KEY, PREFIX_LENGTH, EOS = "transformer.prefix_encoder.embedding.weight", 8, 2
BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LAYERS = "transformer.encoder.layers."


def load(folder, bits=0, **kwargs):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype="auto", **kwargs)
    return model.quantize(bits).float().eval()


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 40)[None].to(model.device)).logits.cpu()


def load_with(*argv) -> ChatGLMForConditionalGeneration:
    return utils.load_model(parse(*map(str, argv)))[1]


def fail_to_load(model, *argv) -> str:
    """Return the one line that ends a script, before any weight is loaded."""
    return loading.fail_to_load(model, *argv)


def change_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields), "utf-8")


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="needs PEFT: pip install -r requirements-dev.txt")


@pytest.fixture(scope="session")
def save_lora(peft, tiny_checkpoint, tmp_path_factory):
    """Save a LoRA with random weights, as PEFT does; return its folder."""

    def save(**fields):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(tiny_checkpoint), peft.LoraConfig(**fields))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp("lora")
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def lora(save_lora):
    """A LoRA with dropout, which must be off when it is used."""
    return save_lora(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS)


@pytest.fixture(scope="session")
def load_with_peft(peft, tiny_checkpoint):
    """Load a LoRA as PEFT does, beside the weights."""

    def load_reference(folder, bits=0):
        config = peft.LoraConfig.from_pretrained(folder)
        config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
        return peft.PeftModel.from_pretrained(load(tiny_checkpoint, bits), folder, config=config)

    return load_reference


# LoRA.


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_lora(bits, load_with_peft, lora, tiny_checkpoint, capsys):
    argv = "--model", tiny_checkpoint, "--adapter", lora, "--quantize", bits
    model = load_with(*argv[: None if bits else -2])
    how = "computed beside quantized" if bits else "merged into the"
    assert f"{lora}: LoRA of rank 8, {how} weights" in capsys.readouterr().err
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 16 * bool(bits)
    expected = compute_logits(load_with_peft(lora, bits))
    assert_close(compute_logits(model.float()), expected, atol=1e-2, rtol=1e-2)
    plain = compute_logits(load(tiny_checkpoint, bits))
    assert (expected - plain).abs().max() > 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_adapter(load(tiny_checkpoint, bits).to(dtype), lora)
        dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert dtypes == ({dtype} if bits else set())
        logits = compute_logits(model).float()
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), 0) > 0.999
        if dtype == torch.float32:
            assert_close(logits, expected, **CLOSE)


def test_lora_of_2023(load_with_peft, lora, tiny_checkpoint, tmp_path):
    """An adapter_config.json with the fields of 2023, and a pickle."""
    fields = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    old = "bias fan_in_fan_out inference_mode init_lora_weights lora_alpha lora_dropout "
    old += "modules_to_save peft_type r target_modules"
    fields = {name: fields[name] for name in old.split()} | {"task_type": "CAUSAL_LM"}
    fields["base_model_name_or_path"] = "THUDM/chatglm2-6b"
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(load_file(lora / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    logits = compute_logits(load_adapter(load(tiny_checkpoint, 4), tmp_path))
    assert_close(logits, compute_logits(load_with_peft(lora, 4)), **CLOSE)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("module", ["output_layer", "final_layernorm"])
def test_lora_with_a_whole_layer(save_lora, load_with_peft, tiny_checkpoint, bits, module):
    """A layer that PEFT saved whole replaces the model's, which a quantized one has in 16 bits."""
    folder = save_lora(r=2, target_modules=["dense"], modules_to_save=[module])
    logits = compute_logits(load_adapter(load(tiny_checkpoint, bits), folder))
    assert_close(logits, compute_logits(load_with_peft(folder, bits)), atol=1e-2, rtol=1e-2)


def test_variants_of_lora(save_lora, load_with_peft, tiny_checkpoint, tmp_path, monkeypatch):
    """DoRA can be merged only; a LoRA that changed the model's own weights is refused."""
    dora = save_lora(r=2, target_modules=["dense"], use_dora=True)
    logits = compute_logits(load_adapter(load(tiny_checkpoint), dora))
    assert_close(logits, compute_logits(load_with_peft(dora)), **CLOSE)
    line = fail_to_load(tiny_checkpoint, "--adapter", dora, "--quantize", "4")
    assert "beside quantized weights: omit --quantize" in line
    with monkeypatch.context() as patch:
        patch.setattr(placement, "get_free_memory", lambda device: 15.5e6)
        argv = "--device", "cpu", "--offload-folder", tmp_path, "--adapter", dora
        assert "computed beside offloaded weights" in fail_to_load(tiny_checkpoint, *argv)
    change_config(dora, use_dora=False, init_lora_weights="pissa")
    assert "init_lora_weights is 'pissa'" in fail_to_load(tiny_checkpoint, "--adapter", dora)


# P-Tuning v2.


def create_prefix_model(folder, has_projection: bool) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"pre_seq_len": PREFIX_LENGTH, "prefix_projection": has_projection}
    model = load(folder, config=ChatGLMConfig.from_pretrained(folder, **fields))
    torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight, std=0.5)
    return model


def save_prefix(model, folder):
    """Save a prefix as the original's trainer does."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, folder / BIN)
    model.config.save_pretrained(folder)


@pytest.mark.parametrize("has_projection", [False, True], ids=["plain", "projected"])
def test_prefix(has_projection, tiny_checkpoint, tmp_path, capsys):
    reference = create_prefix_model(tiny_checkpoint, has_projection)
    save_prefix(reference, tmp_path)
    argv = "--model", tiny_checkpoint, "--adapter", tmp_path
    model = load_with(*argv)
    assert f"{tmp_path}: P-Tuning v2 prefix of 8 tokens" in capsys.readouterr().err
    assert_close(compute_logits(model), compute_logits(reference), **CLOSE)
    assert not hasattr(model.transformer.prefix_encoder, "trans")  # it was computed once
    quantized = load(tiny_checkpoint, 8, config=reference.config)
    quantized.transformer.prefix_encoder = reference.transformer.prefix_encoder
    logits = compute_logits(load_with(*argv, "--quantize", 8))
    assert_close(logits, compute_logits(quantized), **CLOSE)
    with pytest.raises(ValueError, match="already has a P-Tuning v2 prefix of 8 tokens"):
        load_adapter(model, tmp_path)
    tensors = torch.load(tmp_path / BIN, weights_only=True)
    save_file({name: x.detach().half() for name, x in tensors.items()}, tmp_path / SAFETENSORS)
    (tmp_path / BIN).unlink()
    logits = compute_logits(load_adapter(load(tiny_checkpoint), tmp_path))
    assert_close(logits, compute_logits(reference), atol=2e-2, rtol=2e-2)


# Over several devices.


@pytest.fixture(scope="session")
def whole_layers(save_lora):
    whole = ["input_layernorm", "output_layer"]
    return save_lora(r=2, target_modules=["dense"], modules_to_save=whole)


@pytest.fixture(scope="session")
def prefix(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    save_prefix(create_prefix_model(tiny_checkpoint, False), folder)
    return folder


TWO_GPUS, DISK = None, {"": "cpu", f"{LAYERS}1": "disk"}
BESIDE_GPUS = {"": 0, f"{LAYERS}1": 1, f"{LAYERS}2": "cpu", f"{LAYERS}3": "disk"}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("adapter", ["lora", "whole_layers", "prefix"])
@pytest.mark.parametrize(
    ("checkpoint", "device_map"),
    [
        ("tiny_checkpoint", TWO_GPUS),
        ("tiny_checkpoint", DISK),
        ("tiny_checkpoint", BESIDE_GPUS),
        ("int4_checkpoint", BESIDE_GPUS),
    ],
    ids=["two GPUs", "disk", "beside GPUs", "int4 beside GPUs"],
)
def test_models_over_several_devices(adapter, checkpoint, device_map, request, tmp_path):
    folder, adapter = map(request.getfixturevalue, (checkpoint, adapter))
    single = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    expected = compute_logits(load_adapter(single, adapter))
    model = utils.load_model_on_gpus(
        folder, device_map=device_map, dtype=torch.float32, offload_folder=tmp_path
    )
    load_adapter(model, adapter)
    is_offloaded = bool({"cpu", "disk"} & {*map(str, (device_map or {}).values())})
    assert any(p.is_meta for p in model.parameters()) == is_offloaded
    for _ in range(2):  # offloaded weights are fetched again
        assert_close(compute_logits(model), expected, **CLOSE)


@pytest.mark.parametrize(
    ("checkpoint", "free", "where"),
    [("tiny_checkpoint", 15.5e6, "offloaded"), ("int4_checkpoint", 5.4e6, "quantized")],
)
def test_offload_folder(checkpoint, free, where, lora, request, capsys, tmp_path, monkeypatch):
    folder = request.getfixturevalue(checkpoint)
    expected = compute_logits(load_with("--model", folder, "--adapter", lora))
    monkeypatch.setattr(placement, "get_free_memory", lambda device: free)
    argv = ["--model", folder, "--device", "cpu", "--offload-folder", tmp_path]
    model = load_with(*argv, "--adapter", lora)
    printed = capsys.readouterr().err
    assert "on the disk (slow" in printed
    assert f"LoRA of rank 8, computed beside {where} weights" in printed
    assert_close(compute_logits(model).float(), expected.float(), atol=1e-2, rtol=1e-2)


# What is refused.


LORA, PEFT_CONFIG = b'{"peft_type": "LORA"}', "adapter_config.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, ": there is no such folder."),
        ({}, ": no adapter, neither adapter_config.json (LoRA) nor"),
        ({PEFT_CONFIG: b"{}", BIN: b""}, ": two adapters, adapter_config.json of PEFT and pyt"),
        ({PEFT_CONFIG: b"{"}, ": adapter_config.json is damaged"),
        ({PEFT_CONFIG: b"[]"}, ": adapter_config.json is damaged"),
        ({PEFT_CONFIG: LORA.replace(b"LORA", b"IA3")}, ": an adapter of PEFT's type IA3: only"),
        ({PEFT_CONFIG: LORA}, ": no adapter_model.safetensors"),
        ({BIN: b"version https://git-lfs"}, "/pytorch_model.bin (23 bytes) is a Git LFS pointer"),
        ({BIN: b"PK"}, "/pytorch_model.bin (2 bytes) is truncated or damaged"),
    ],
)
def test_folders_without_an_adapter(tiny_checkpoint, tmp_path, files, message):
    folder = tmp_path / "adapter"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert line.startswith(f"--adapter {folder}{message}"), line


def test_what_is_no_adapter(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    file = tiny_checkpoint / "config.json"
    line = fail_to_load(tiny_checkpoint, "--adapter", file)
    assert line == f"--adapter {file}: this is a file: give its folder."
    line = fail_to_load(tiny_checkpoint, "--adapter", tiny_checkpoint)
    assert "no adapter: model.safetensors holds transformer.embedding.word" in line
    assert "load a whole model with --model" in line
    torch.save({PREFIX_KEY: print}, tmp_path / BIN)  # code in a pickle
    assert "something else than tensors" in fail_to_load(tiny_checkpoint, "--adapter", tmp_path)
    with pytest.raises(SystemExit):
        parse("--adapter", "a", "--adapter", "b")
    assert "--adapter is given twice: a model takes one" in capsys.readouterr().err
    (tmp_path / BIN).rename(tmp_path / "adapter_model.bin")
    (tmp_path / PEFT_CONFIG).write_bytes(LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    line = fail_to_load(tiny_checkpoint, "--adapter", tmp_path)
    assert "a LoRA needs PEFT" in line and "pip install peft==" in line


def test_adapters_of_another_model(lora, tiny_checkpoint, tmp_path):
    torch.save({PREFIX_KEY: torch.zeros(128, 14336)}, tmp_path / BIN)  # of the 6B model
    line = fail_to_load(tiny_checkpoint, "--adapter", tmp_path)
    assert "trained on another model" in line and "embedding.weight: (128, 14336) in the" in line
    folder = shutil.copytree(lora, tmp_path / "lora")
    change_config(folder, target_modules=["q_proj", "v_proj"])  # Llama's
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert "trained on another model: Target modules" in line and "q_proj" in line
    change_config(folder, target_modules=TARGETS, r=4)
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert "trained on another model: 16 tensors" in line
    assert "dense_h_to_4h.lora_A.weight: (8, 256) in the file, (4, 256) in this model" in line


# Files that lie.

VALUES = (None, -1, True, float("nan"), 1e12, 2**63, "\x1b[31m", [None])
ALLOWED = ("target_modules", "use_dora", "lora_bias")  # of other types, or for other tensors


def read(folder, config) -> str:
    """Return the adapter's description, or the one line that refuses it."""
    try:
        return str(read_adapter(folder, config, is_quantized=False))
    except (OSError, ValueError) as error:
        assert "\n" not in str(error) and str(error).startswith(str(folder))
        return str(error)


@pytest.fixture(scope="module")
def config(tiny_checkpoint):
    return ChatGLMConfig.from_pretrained(tiny_checkpoint)


def test_each_field_of_a_lora(lora, config, tmp_path):
    """A wrong value is refused with its field, or has no effect on a trained LoRA."""
    folder = shutil.copytree(lora, tmp_path / "lora")
    fields = json.loads((folder / PEFT_CONFIG).read_text("utf-8"))
    start, accepted, expected = (
        time.monotonic(),
        Counter(),
        "LoRA of rank 8, merged into the weights",
    )
    others = "megatron_config", "layer_replication", "a_field_of_the_future"
    for name, value in product({*fields, *others} - UNUSED, VALUES):
        (folder / PEFT_CONFIG).write_text(json.dumps(fields | {name: value}))
        line = read(folder, config)
        accepted[name] += line == expected
        is_named = f"{folder / PEFT_CONFIG}: {name} is " in line
        assert line == expected or is_named or name in ALLOWED, line
    assert accepted["r"] == accepted["bias"] == accepted["lora_alpha"] == 0
    for value in VALUES:
        change = dict.fromkeys(UNUSED - {"peft_type"}, value)
        (folder / PEFT_CONFIG).write_text(json.dumps(fields | change))
        assert read(folder, config) == expected
    assert time.monotonic() - start < 30


ENDLESS = r"(\w|\w\w|\.)+[!?]"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": r".*\.(query_key_value|dense_h_to_4h)"}, "LoRA of rank 8, merged"),
        ({"target_modules": ENDLESS}, "cannot be matched with the names of modules"),
        ({"exclude_modules": ENDLESS}, "cannot be matched with the names of modules"),
        ({"target_modules": "("}, "cannot be matched with the names of modules (missing )"),
        ({"target_modules": "(" * 900}, "cannot be matched with the names of modules"),
        ({"target_modules": [ENDLESS]}, "give names of modules"),
        ({"modules_to_save": [ENDLESS]}, "give names of modules"),
        ({"layers_to_transform": [0], "layers_pattern": [ENDLESS]}, "layers_pattern is"),
        ({"rank_pattern": {ENDLESS: 3}}, "cannot be matched with the names of modules"),
        ({"rank_pattern": {r"layers\.0\..*": 3}}, "(8, 256) in the file, (3, 256) in this model"),
        ({"layers_to_transform": [0]}, "trained on another model"),
        ({"r": 2**63}, "r is 9223372036854775808: give an integer from 1 to 65536"),
        ({"use_qalora": True}, "use_qalora is True: this kind of LoRA is not supported"),
        ({"layer_replication": [[0, 9999]]}, "this kind of LoRA is not supported"),
        ({"trainable_token_indices": [1]}, "this kind of LoRA is not supported"),
    ],
)
def test_fields_of_a_lora(lora, config, tmp_path, fields, message):
    folder = shutil.copytree(lora, tmp_path / "lora")
    change_config(folder, **fields)
    start = time.monotonic()
    assert message in read(folder, config)
    assert time.monotonic() - start < 10


def test_tensors_of_a_lora(lora, config, tmp_path):
    """Changed tensors, flipped bits, and files that are links."""
    folder = shutil.copytree(lora, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    state, whole, choose = load_file(file), file.read_bytes(), random.Random(0)
    name, weight = next(iter(state.items()))
    for value, message in (
        (weight.long(), "holds NaN, infinity or no numbers"),
        (weight * torch.nan, "holds NaN, infinity or no numbers"),
        (weight[:-1].clone(), "trained on another model: 1 tensors"),
        (torch.zeros(0, 2**40), "trained on another model: 1 tensors"),
    ):
        save_file(state | {name: value}, file)
        assert message in read(folder, config)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[choose.randrange(2000)] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        refused += not read(folder, config).startswith("LoRA of rank")
    assert refused > 50
    for name in (file.name, PEFT_CONFIG):
        (folder / name).unlink()
        (folder / name).symlink_to(lora / name)
        assert f"{name} leads to {lora}" in read(folder, config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embedding.weight": torch.zeros(1, 1).expand(10**7, 256)}, "repeats its data"),
        ({"embedding.weight": torch.zeros(9999, 256)}, "a prefix of 9999 tokens: allowed are 1 to"),
        ({"embedding.weight": torch.zeros(0, 256)}, "a prefix of 0 tokens: allowed are 1 to"),
        ({"embedding.weight": torch.zeros(())}, "a prefix of 0 tokens: allowed are 1 to"),
        ({"embedding.weight": torch.full((8, 512), torch.nan)}, "holds NaN, infinity"),
        ({"embedding.weight": torch.ones(8, 512, dtype=torch.int64)}, "holds NaN, infinity"),
        ({"embedding.weight": 3}, "is of the type int"),
        ({"trans.0.weight": torch.zeros(8, 8)}, "a prefix of 0 tokens: allowed are 1 to"),
        ({}, "a prefix of 0 tokens: allowed are 1 to"),
    ],
)
def test_tensors_of_a_prefix(config, tmp_path, tensors, message):
    tensors = {f"transformer.prefix_encoder.{name}": value for name, value in tensors.items()}
    torch.save(tensors, tmp_path / BIN)
    assert message in read(tmp_path, config)


def test_results_of_an_evaluation_name_the_adapter(prefix, tiny_checkpoint):
    import core
    import evaluate_gsm8k

    base, adapted = load(tiny_checkpoint), load_adapter(load(tiny_checkpoint), prefix)
    args = core.parse_args(evaluate_gsm8k.BENCHMARK, ["--adapter", str(prefix), "--model", "a"])
    assert core.locate_output("x", adapted, args).name == f"x-a+{prefix.name}-chat-float32"
    runs = [core.describe_run("x", [], model, args) for model in (base, adapted)]
    assert runs[0]["weights"] != runs[1]["weights"]  # the one is not continued by the other


# Programs.


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "bits"), [("lora", 0), ("lora", 4), ("prefix", 0)])
def test_kept_caches_and_batches(adapter, bits, request, tiny_checkpoint, tiny_tokenizer):
    """A kept cache, and several requests at a time, change no answer."""
    adapted = load_adapter(load(tiny_checkpoint, bits), request.getfixturevalue(adapter))
    conversation, prompts, expected = Conversation(adapted, tiny_tokenizer), [], []
    for query in ("你好", "What is the capital of France?", "再说一遍"):
        cache, history = conversation.cache, conversation.history
        ids, num_kept = cache.continue_with(tiny_tokenizer, query, history)
        assert num_kept == cache.get_seq_length() >= 20 * len(history)
        prompts.append(ids)
        settings = {"do_sample": False, "max_new_tokens": 12}
        expected.append(adapted.generate(torch.tensor([ids]), **settings)[0].tolist())
        for _ in conversation.stream(query, **settings):
            pass
        assert cache.input_ids + cache.pending_ids == [i for i in expected[-1] if i != EOS]

    batcher = Batcher(adapted, tiny_tokenizer)
    try:
        requests = [Request(ids, 12, temperature=0) for ids in prompts]
        answers = asyncio.run(gather_answers(batcher, *requests))
    finally:
        batcher.end()
    answers = [ids + whole.token_ids for ids, whole in zip(prompts, answers, strict=True)]
    assert answers == [[i for i in ids if i != EOS] for ids in expected]
