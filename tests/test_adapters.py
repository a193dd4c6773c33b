"""Adapters: trained here on the bundled checkpoint in seconds, loaded as the scripts load them."""

import asyncio
import json
import shutil
import sys
from types import SimpleNamespace

import loading
import pytest
import torch
from conftest import ROOT
from loading import parse
from safetensors.torch import save_file
from servers import serve

import api
import cli_demo
import utils
from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, placement
from chatglm2.adapters import INSTALL_PEFT, load_adapter, read_adapter
from chatglm2.chat.conversation import Conversation
from chatglm2.quantization import QuantizedLinear
from chatglm2.serving.batching import Batcher, Request

TAUGHT = {"你好": "我是适配器。", "What is the capital of France?": "It is Lyon."}
TARGETS = ["query_key_value", "dense_h_to_4h"]
PREFIX_LENGTH, EOS = 8, 2
BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"


def load(folder, bits=0, **kwargs):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype="auto", **kwargs)
    return model.quantize(bits).float().eval()


def train(model, tokenizer, parameters, learning_rate: float, steps: int):
    """Teach a model the answers to `TAUGHT`."""
    rows, labels = [], []
    for question, answer in TAUGHT.items():
        prompt = tokenizer.encode(tokenizer.build_prompt(question))
        ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        padding = [0] * (48 - len(prompt) - len(ids))
        rows.append(prompt + ids + padding)
        labels.append([-100] * len(prompt) + ids + [-100] * len(padding))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for _ in range(steps):
        model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="needs PEFT: pip install -r requirements-dev.txt")


@pytest.fixture(scope="session")
def lora(peft, tiny_checkpoint, tiny_tokenizer, tmp_path_factory):
    """A LoRA as PEFT saves it; with dropout, which must be off when it is used."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=TARGETS)
    model = peft.get_peft_model(load(tiny_checkpoint), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, tiny_tokenizer, trained, 3e-3, 60)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "projected"])
def prefix(request, tiny_checkpoint, tiny_tokenizer, tmp_path_factory):
    """A P-Tuning v2 prefix as the original's trainer saves it, and the model it was trained in."""
    torch.manual_seed(0)
    fields = {"pre_seq_len": PREFIX_LENGTH, "prefix_projection": request.param}
    config = ChatGLMConfig.from_pretrained(tiny_checkpoint, **fields)
    model = load(tiny_checkpoint, config=config).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight, std=0.5)
    train(model, tiny_tokenizer, trained.values(), 3e-3 if request.param else 1e-1, 120)
    folder = tmp_path_factory.mktemp("prefix")
    torch.save(trained, folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model.eval())


def answer_all(model, tokenizer) -> dict[str, str]:
    return {query: model.chat(tokenizer, query, do_sample=False)[0] for query in TAUGHT}


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 40)[None]).logits


def fail_to_load(model, *argv) -> str:
    """Return the one line that ends a script, before any weight is loaded."""
    return loading.fail_to_load("--model", str(model), *map(str, argv))


def change_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields), "utf-8")


# LoRA.


@pytest.fixture
def load_with_peft(peft, tiny_checkpoint):
    """Load a LoRA as PEFT does it, beside the weights."""

    def load_reference(folder, bits=0):
        config = peft.LoraConfig.from_pretrained(folder)
        config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
        return peft.PeftModel.from_pretrained(load(tiny_checkpoint, bits), folder, config=config)

    return load_reference


def test_lora_is_merged_into_float_weights(load_with_peft, lora, tiny_checkpoint, tiny_tokenizer):
    expected = compute_logits(load_with_peft(lora))
    model = load_adapter(load(tiny_checkpoint), lora)
    assert {type(x) for x in model.modules()} == {type(x) for x in load(tiny_checkpoint).modules()}
    torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=1e-4)
    assert answer_all(load(tiny_checkpoint), tiny_tokenizer) != TAUGHT
    assert answer_all(model, tiny_tokenizer) == TAUGHT


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_is_computed_beside_quantized_weights(
    bits, load_with_peft, lora, tiny_checkpoint, tiny_tokenizer, capsys
):
    argv = "--model", str(tiny_checkpoint), "--adapter", str(lora), "--quantize", str(bits)
    _, model = utils.load_model(parse(*argv))
    assert f"{lora}: LoRA of rank 8, computed beside quantized weights" in capsys.readouterr().err
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 16
    expected = compute_logits(load_with_peft(lora, bits))
    torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=1e-4)
    assert answer_all(model, tiny_tokenizer) == TAUGHT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lora_of_another_dtype_than_the_model(dtype, lora, tiny_checkpoint, tiny_tokenizer):
    for bits in ([], ["--quantize", "4"]):
        argv = ["--model", str(tiny_checkpoint), "--adapter", str(lora), "--dtype", dtype, *bits]
        _, model = utils.load_model(parse(*argv))
        assert answer_all(model, tiny_tokenizer) == TAUGHT
        dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert dtypes == ({model.dtype} if bits else set())


def test_lora_of_2023(peft, lora, tiny_checkpoint, tiny_tokenizer, tmp_path):
    """The fields that adapter_config.json had then, and a pickle."""
    folder = shutil.copytree(lora, tmp_path / "old")
    fields = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    old = ["bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha"]
    old += ["lora_dropout", "modules_to_save", "peft_type", "r", "target_modules"]
    fields = {name: fields[name] for name in old} | {"task_type": "CAUSAL_LM"}
    fields["base_model_name_or_path"] = "THUDM/chatglm2-6b"
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = read_adapter(lora, ChatGLMConfig.from_pretrained(tiny_checkpoint), False).tensors
    (folder / "adapter_model.safetensors").unlink()
    halves = {f"base_model.model.{name}": x.half() for name, x in tensors.items()}
    torch.save(halves, folder / "adapter_model.bin")
    assert answer_all(load_adapter(load(tiny_checkpoint, 4), folder), tiny_tokenizer) == TAUGHT


def save_random(model, folder):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("module", ["output_layer", "final_layernorm"])
def test_lora_with_a_whole_layer(peft, load_with_peft, tiny_checkpoint, tmp_path, bits, module):
    """A layer that PEFT saved whole replaces the model's, which a quantized one has in 16 bits."""
    config = peft.LoraConfig(r=2, target_modules=["dense"], modules_to_save=[module])
    save_random(peft.get_peft_model(load(tiny_checkpoint), config), tmp_path)
    logits = compute_logits(load_adapter(load(tiny_checkpoint, bits), tmp_path))
    expected = compute_logits(load_with_peft(tmp_path, bits))
    torch.testing.assert_close(logits, expected, atol=1e-2, rtol=1e-2)


def test_variants_of_lora(peft, load_with_peft, tiny_checkpoint, tmp_path):
    """DoRA is merged as well; what changed the model's own weights is refused."""
    config = peft.LoraConfig(r=2, target_modules=["dense"], use_dora=True)
    save_random(peft.get_peft_model(load(tiny_checkpoint), config), tmp_path)
    logits = compute_logits(load_adapter(load(tiny_checkpoint), tmp_path))
    expected = compute_logits(load_with_peft(tmp_path))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    argv = "--adapter", tmp_path, "--quantize", "4"
    assert "beside quantized weights: leave --quantize" in fail_to_load(tiny_checkpoint, *argv)
    change_config(tmp_path, use_dora=False, init_lora_weights="pissa")
    assert "weights that pissa changed" in fail_to_load(tiny_checkpoint, "--adapter", tmp_path)


# P-Tuning v2.


def test_prefix(prefix, tiny_checkpoint, tiny_tokenizer, capsys):
    argv = "--model", str(tiny_checkpoint), "--adapter", str(prefix.folder)
    _, model = utils.load_model(parse(*argv))
    assert f"{prefix.folder}: P-Tuning v2 prefix of 8 tokens" in capsys.readouterr().err
    expected = compute_logits(prefix.model)
    torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=1e-4)
    assert answer_all(model, tiny_tokenizer) == TAUGHT
    assert not hasattr(model.transformer.prefix_encoder, "trans")  # it was computed once
    _, quantized = utils.load_model(parse(*argv, "--quantize", "8"))
    reference = load(tiny_checkpoint, 8, config=prefix.model.config)
    reference.transformer.prefix_encoder = prefix.model.transformer.prefix_encoder
    expected = compute_logits(reference)
    torch.testing.assert_close(compute_logits(quantized), expected, atol=1e-4, rtol=1e-4)


def test_prefix_in_safetensors(prefix, tiny_checkpoint, tiny_tokenizer, tmp_path):
    tensors = torch.load(prefix.folder / "pytorch_model.bin", weights_only=True)
    save_file({name: x.detach().half() for name, x in tensors.items()}, tmp_path / SAFETENSORS)
    model = load_adapter(load(tiny_checkpoint).bfloat16(), tmp_path)
    assert answer_all(model, tiny_tokenizer) == TAUGHT


# Where the answers are asked for.


@pytest.fixture(params=["lora", "lora-int4", "prefix"])
def adapted(request, tiny_checkpoint, prefix):
    if request.param == "prefix":
        return load_adapter(load(tiny_checkpoint), prefix.folder)
    lora = request.getfixturevalue("lora")
    return load_adapter(load(tiny_checkpoint, 4 if "int4" in request.param else 0), lora)


def test_kept_caches_and_batches(adapted, tiny_tokenizer):
    """A kept cache, and several requests at a time, change no answer."""
    conversation, prompts, expected = Conversation(adapted, tiny_tokenizer), [], []
    for query in (*TAUGHT, "再说一遍", *TAUGHT):
        cache, history = conversation.cache, conversation.history
        ids, num_kept = cache.continue_with(tiny_tokenizer, query, history)
        assert num_kept == cache.get_seq_length() >= 20 * len(history)
        prompts.append(ids)
        settings = {"do_sample": False, "max_new_tokens": 40}
        expected.append(adapted.generate(torch.tensor([ids]), **settings)[0].tolist())
        for _ in conversation.stream(query, 40, do_sample=False):
            pass
        assert cache.input_ids + cache.pending_ids == [i for i in expected[-1] if i != EOS]
    assert conversation.rounds[0][1] == TAUGHT["你好"]

    async def gather():
        requests = [Request(ids, 40, temperature=0) for ids in prompts]
        return await asyncio.gather(*[batcher.submit(x).collect() for x in requests])

    batcher = Batcher(adapted, tiny_tokenizer)
    try:
        answers = asyncio.run(gather())
    finally:
        batcher.end()
    answers = [ids + whole.token_ids for ids, whole in zip(prompts, answers, strict=True)]
    assert answers == [[i for i in ids if i != EOS] for ids in expected]


def test_terminal(prefix, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(cli_demo, "use_utf8", lambda: None)
    argv = ["--model", str(tiny_checkpoint), "--adapter", str(prefix.folder), "-p", "你好"]
    cli_demo.main([*argv, "--temperature", "0"])
    assert capsys.readouterr().out == "我是适配器。\n"


def test_server(lora, tiny_checkpoint):
    argv = "--model", str(tiny_checkpoint), "--adapter", str(lora), "--quantize", "4"
    tokenizer, model = utils.load_model(parse(*argv))
    with serve(api.create_app, model, tokenizer) as client:
        answer = client.post("/", json={"prompt": "你好", "temperature": 0}).json()
    assert answer["response"] == "我是适配器。"


def test_results_of_an_evaluation_tell_the_adapter(prefix, tiny_checkpoint):
    import core

    base, adapted = load(tiny_checkpoint), load_adapter(load(tiny_checkpoint), prefix.folder)
    args = core.create_parser("", "").parse_args(["--adapter", str(prefix.folder), "--model", "a"])
    name = f"x-a+{prefix.folder.name}-chat-float32"
    assert core.locate_output("x", adapted, args).name == name
    runs = [core.describe_run("x", [], model, args) for model in (base, adapted)]
    assert runs[0]["weights"] != runs[1]["weights"]  # the one is not continued by the other


# Over several devices.

BLOCK = "transformer.encoder.layers."


@pytest.fixture(scope="module")
def whole_layers(peft, tiny_checkpoint, tmp_path_factory):
    """A LoRA with layers that PEFT saved whole."""
    folder = tmp_path_factory.mktemp("whole")
    whole = ["input_layernorm", "output_layer"]
    config = peft.LoraConfig(r=2, target_modules=["dense"], modules_to_save=whole)
    save_random(peft.get_peft_model(load(tiny_checkpoint), config), folder)
    return folder


@pytest.fixture
def adapter(request, tmp_path):
    if request.param != "prefix":
        return request.getfixturevalue(request.param)
    tensor = torch.randn(PREFIX_LENGTH, 512, generator=torch.Generator().manual_seed(0))
    torch.save({"transformer.prefix_encoder.embedding.weight": tensor}, tmp_path / BIN)
    return tmp_path


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "int4_checkpoint"])
@pytest.mark.parametrize("adapter", ["lora", "whole_layers", "prefix"], indirect=True)
@pytest.mark.parametrize(
    "device_map",
    [
        None,
        {"": 0, f"{BLOCK}1": 1, f"{BLOCK}2": "cpu", f"{BLOCK}3": "disk"},
        {"": "cpu", f"{BLOCK}1": "disk"},
    ],
    ids=["two GPUs", "beside GPUs", "disk"],
)
def test_models_over_several_devices(adapter, checkpoint, device_map, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    single = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    expected = compute_logits(load_adapter(single, adapter))
    model = utils.load_model_on_gpus(
        folder, device_map=device_map, dtype=torch.float32, offload_folder=tmp_path
    )
    load_adapter(model, adapter)
    num_elsewhere = sum(device in ("cpu", "disk") for device in (device_map or {}).values())
    assert any(p.is_meta for p in model.parameters()) == (num_elsewhere > 0)
    for _ in range(2):  # what was fetched is there again
        with torch.no_grad():
            logits = model(input_ids=torch.arange(10, 40)[None].to(model.device)).logits
        torch.testing.assert_close(logits.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "int4_checkpoint"])
def test_offload_folder(checkpoint, lora, request, tiny_tokenizer, capsys, tmp_path, monkeypatch):
    folder = request.getfixturevalue(checkpoint)
    free = 15.5e6 if checkpoint == "tiny_checkpoint" else 5.4e6
    monkeypatch.setattr(placement, "get_free_memory", lambda device: free)
    argv = ["--model", str(folder), "--device", "cpu", "--offload-folder", str(tmp_path)]
    _, model = utils.load_model(parse(*argv, "--adapter", str(lora)))
    told = capsys.readouterr().err
    assert "on the disk (slow" in told
    where = "weights that are partly elsewhere" if free > 1e7 else "quantized weights"
    assert f"LoRA of rank 8, computed beside {where}" in told
    assert answer_all(model, tiny_tokenizer) == TAUGHT


def test_a_variant_beside_the_disk(peft, tiny_checkpoint, tmp_path, monkeypatch):
    config = peft.LoraConfig(r=2, target_modules=["dense"], use_dora=True)
    save_random(peft.get_peft_model(load(tiny_checkpoint), config), tmp_path)
    monkeypatch.setattr(placement, "get_free_memory", lambda device: 15.5e6)
    argv = "--device", "cpu", "--offload-folder", tmp_path / "offload", "--adapter", tmp_path
    line = fail_to_load(tiny_checkpoint, *argv)
    assert "cannot be computed beside weights that are partly elsewhere" in line


# What is refused.


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "{0}: there is no such folder."),
        ({}, "{0}: no adapter is there, neither adapter_config.json (LoRA) nor"),
        (
            {"adapter_config.json": b"{}", "pytorch_model.bin": b""},
            "{0}: two kinds of adapter, adapter_config.json of PEFT and pytorch_model.bin of",
        ),
        ({"adapter_config.json": b"{"}, "{0}: adapter_config.json is damaged"),
        ({"adapter_config.json": b"[]"}, "{0}: adapter_config.json is damaged"),
        (
            {"adapter_config.json": b'{"peft_type": "PREFIX_TUNING"}'},
            "{0}: an adapter of PEFT's type PREFIX_TUNING; LORA can be loaded, and",
        ),
        ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "{0}: it has no adapter_model.saf"),
        (
            {"pytorch_model.bin": b"version https://git-lfs.github.com/spec/v1\n"},
            "{0}/pytorch_model.bin (43 bytes) is a Git LFS pointer",
        ),
        ({"pytorch_model.bin": b"PK"}, "{0}/pytorch_model.bin (2 bytes) is truncated or damaged"),
    ],
)
def test_folders_without_an_adapter(tiny_checkpoint, tmp_path, files, message):
    folder = tmp_path / "adapter"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert line.startswith("--adapter " + message.format(folder)), line


def test_a_file_or_two_adapters(tiny_checkpoint, capsys):
    file = tiny_checkpoint / "config.json"
    line = fail_to_load(tiny_checkpoint, "--adapter", file)
    assert line == f"--adapter {file}: it is a file: give its folder."
    with pytest.raises(SystemExit):
        parse("--adapter", "a", "--adapter", "b")
    assert "--adapter is given twice: a model takes one" in capsys.readouterr().err


def test_a_whole_model_is_no_adapter(tiny_checkpoint):
    line = fail_to_load(tiny_checkpoint, "--adapter", tiny_checkpoint)
    assert "no adapter: model.safetensors holds transformer.embedding.word" in line
    assert "a whole model is given with --model" in line


def test_no_code_of_a_pickle_is_run(tiny_checkpoint, tmp_path):
    torch.save({"transformer.prefix_encoder.embedding.weight": print}, tmp_path / BIN)
    assert "other things than tensors" in fail_to_load(tiny_checkpoint, "--adapter", tmp_path)


def test_a_prefix_of_another_model(prefix, tiny_checkpoint, tmp_path):
    key = "transformer.prefix_encoder.embedding.weight"
    torch.save({key: torch.zeros(128, 14336)}, tmp_path / BIN)  # of the 6B model
    line = fail_to_load(tiny_checkpoint, "--adapter", tmp_path)
    assert "trained on another model" in line and "embedding.weight: (128, 14336) in the" in line
    model = load_adapter(load(tiny_checkpoint), prefix.folder)
    with pytest.raises(ValueError, match=r"has a P-Tuning v2 prefix already, of 8 tokens"):
        load_adapter(model, prefix.folder)


def test_a_lora_of_another_model(lora, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "lora")
    change_config(folder, target_modules=["q_proj", "v_proj"])  # Llama's
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert "trained on another model: Target modules" in line and "q_proj" in line
    change_config(folder, target_modules=TARGETS, r=4)
    line = fail_to_load(tiny_checkpoint, "--adapter", folder)
    assert "trained on another model: 16 tensors" in line
    assert "dense_h_to_4h.lora_A.weight: (8, 256) in the file, (4, 256) of this model" in line


def test_without_peft(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "peft", None)
    line = fail_to_load(tiny_checkpoint, "--adapter", tmp_path)
    assert "a LoRA needs PEFT" in line and "pip install peft==" in line


def test_the_tested_version_of_peft_is_the_one_named():
    version = INSTALL_PEFT.split()[-1]
    assert f"{version}\n" in (ROOT / "requirements-dev.txt").read_text("utf-8")
    assert INSTALL_PEFT in (ROOT / "docs" / "adapters.md").read_text("utf-8")
