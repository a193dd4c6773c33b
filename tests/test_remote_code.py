"""The package's files as Hugging Face remote code, and the registered package against foreign code.

One other process, which cannot import this project, loads every kind of folder with
trust_remote_code=True; what it computes is compared with the package itself.
"""

import importlib
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import TINY
from test_modeling_chatglm import save_shards
from test_refresh import AUTO_MAPS, write_copies, write_snapshot

import chatglm2
from chatglm2 import refresh

CLASSES = {auto: name.partition(".")[2] for auto, name in AUTO_MAPS["config.json"].items()}
CLASSES["AutoTokenizer"] = "ChatGLMTokenizer"
CONFIG = json.loads("""{
"model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_qkv_bias": true,
"ffn_hidden_size": 48, "hidden_size": 32, "kv_channels": 8, "multi_query_attention": true,
"multi_query_group_num": 2, "num_attention_heads": 4, "num_layers": 2, "original_rope": true,
"padded_vocab_size": 4096, "seq_length": 256, "use_cache": true, "torch_dtype": "float32",
"transformers_version": "4.27.1", "tie_word_embeddings": false, "eos_token_id": 2,
"pad_token_id": 0}""")


def probe(model, tokenizer) -> dict:
    """Return logits and answers of a model as plain data."""
    import torch

    inputs = tokenizer(["你好", "Where do you live?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.tolist()
    greedy = {"do_sample": False, "max_new_tokens": 6}
    response, history = model.chat(tokenizer, "你好", **greedy)
    first = [text for text, _ in model.stream_chat(tokenizer, "你好", **greedy)]
    greedy["return_past_key_values"] = True
    turns = list(model.stream_chat(tokenizer, "你好", **greedy))
    turns += model.stream_chat(tokenizer, "Again?", history, turns[-1][2], **greedy)
    second = [text for text, _, _ in turns]
    return {"logits": logits, "chat": [response, history], "streams": [first, second]}


def load_as_remote_code(work):
    """Run in the other process: load, probe and save the folders in `work`; write results.json."""
    import json
    import sys
    from pathlib import Path

    sys.modules["chatglm2"] = None  # not even where it is installed

    import torch
    import transformers

    results, work = {}, Path(work)

    def load(name, auto_class="AutoModel", **more):
        options = {"trust_remote_code": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        options |= {"dtype": torch.float32, **more}
        return getattr(transformers, auto_class).from_pretrained(name, **options), tokenizer

    def describe(name, model, tokenizer):
        results[name] = probe(model, tokenizer) | {
            "modules": [type(x).__module__ for x in (model, model.config, tokenizer)],
            "origin": getattr(sys.modules[type(model).__module__], "ORIGIN", None),
        }

    def save(name, *parts):
        for part in parts:
            part.save_pretrained(work / name)
        describe(name, *load(work / name))

    first = load(work / "first", "AutoModelForCausalLM")
    describe("first", *first)
    for name in ("second", "bundled", "saved", "int4"):
        describe(name, *load(work / name))
    describe("hub", *load("THUDM/chatglm2-6b"))
    save("saved again", *first)
    describe("first, still", *first)
    quantization = {"quant_method": "chatglm", "bits": 8}
    quantized = load(work / "second", quantization_config=quantization)
    describe("int8", *quantized)
    save("int8 saved", *quantized)
    for name in ("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"):
        results.setdefault("classes", {})[name] = type(load(work / "first", name)[0]).__name__
    (work / "results.json").write_text(json.dumps(results))


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Return weights under the official names; bytes and special tokens are never the likeliest."""
    torch.manual_seed(seed)
    config = chatglm2.ChatGLMConfig(**CONFIG)
    model = chatglm2.ChatGLMForConditionalGeneration(config, empty_init=False)
    weights = {name: torch.randn_like(x) * 0.2 for name, x in model.state_dict().items()}
    output = weights["transformer.output_layer.weight"]
    output[:259] = output[4091:] = 0
    return weights


def write_data(folder: Path, **fields):
    folder.mkdir(parents=True)
    files = {"config.json": CONFIG | fields, "tokenizer_config.json": {"remove_space": False}}
    for name, content in files.items():
        text = json.dumps(content | {"auto_map": AUTO_MAPS[name]})
        (folder / name).write_text(text, "utf-8")
    shutil.copy(TINY / "tokenizer.model", folder)


def write_int4(folder: Path, source: Path):
    """Write an INT4 checkpoint as the official one is: `.bin`, only quantization_bit."""
    write_data(folder, quantization_bit=4, torch_dtype="float16")
    model = chatglm2.ChatGLMForConditionalGeneration.from_pretrained(source, dtype=torch.float16)
    save_shards(folder, model.quantize(4).state_dict())
    for file in refresh.CODE_FILES:
        shutil.copy(file, folder)


def poison(folder: Path, marker: Path):
    """Write code files that leave `marker` when they are executed."""
    for name in (*(file.name for file in refresh.CODE_FILES), "__init__.py"):
        text = f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('{name} was executed')\n"
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_checkpoint) -> Path:
    """A folder of checkpoints: by hand, refreshed, from the hub, saved by the package, bundled."""
    work = tmp_path_factory.mktemp("remote code")
    first, second = work / "first", work / "second"
    for folder in (first, second):
        write_data(folder)
    safetensors.torch.save_file(random_weights(1), first / "model.safetensors", {"format": "pt"})
    for file in refresh.CODE_FILES:
        shutil.copy(file, first)

    save_shards(second, random_weights(2))
    poison(second, work / "executed")
    snapshot = write_snapshot(work / "hub", second)
    write_copies(work / "modules", snapshot)  # of the old code, in an attempt that failed
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_MODULES_CACHE", str(work / "modules"))
        refresh.main([str(snapshot)])
    refresh.main([str(second)])
    with open(second / "modeling_chatglm.py", "a") as file:
        file.write('\nORIGIN = "second"\n')
    write_int4(work / "int4", first)

    shutil.copytree(tiny_checkpoint, work / "bundled")
    refresh.main([str(work / "bundled")])

    model = chatglm2.ChatGLMForConditionalGeneration.from_pretrained(first)
    model.save_pretrained(work / "saved")
    chatglm2.ChatGLMTokenizer.from_pretrained(first).save_pretrained(work / "saved")
    return work


@pytest.fixture(scope="module")
def remote(work) -> dict:
    """The results of `load_as_remote_code`."""
    functions = "\n\n".join(inspect.getsource(f) for f in (probe, load_as_remote_code))
    script = f"{functions}\n\nload_as_remote_code({str(work)!r})\n"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub")}
    environment["HF_MODULES_CACHE"] = str(work / "modules")
    command, options = [sys.executable, "-c", script], {"encoding": "utf-8", "timeout": 300}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert "inv_freq" not in done.stderr
    return json.loads((work / "results.json").read_text())


def probe_package(folder: Path, bits: int = 0) -> dict:
    """Return what the package itself computes with a folder's weights and vocabulary."""
    model = chatglm2.ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    results = probe(model.quantize(bits), chatglm2.ChatGLMTokenizer.from_pretrained(folder))
    return json.loads(json.dumps(results))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "bits", "names"),
    [
        ("first", 0, ["first", "saved", "saved again", "first, still"]),
        ("second", 0, ["second", "hub"]),
        ("bundled", 0, ["bundled"]),
        ("int4", 0, ["int4"]),
        ("second", 8, ["int8", "int8 saved"]),
    ],
)
def test_remote_code_computes_what_the_package_does(work, remote, source, bits, names, monkeypatch):
    monkeypatch.setenv("CHATGLM_BACKEND", "torch")  # remote code has no kernels
    expected = probe_package(work / source, bits)
    response, (first, second) = expected["chat"][0], expected["streams"]
    assert response and first[-1] == response and response in second and len(second) > len(first)
    for result in map(remote.get, names):
        assert all(module.startswith("transformers_modules.") for module in result["modules"])
        logits, expected_logits = (torch.tensor(x["logits"]) for x in (result, expected))
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        assert result["chat"] == expected["chat"]
        assert result["streams"] == expected["streams"]


@pytest.mark.slow
def test_two_folders_in_one_process(remote):
    assert remote["first"]["logits"] != remote["second"]["logits"]
    assert remote["first"]["modules"] != remote["second"]["modules"]
    origins = [remote[name]["origin"] for name in ("first", "second", "first, still")]
    assert origins == [None, "second", None]
    assert len(remote["classes"]) == 2 and remote["classes"].items() <= CLASSES.items()


@pytest.mark.slow
def test_old_code_is_not_executed(work, remote):
    assert not (work / "executed").exists()
    with pytest.raises(RuntimeError, match="was executed"):  # it would have been noticed
        runpy.run_path(str(work / "second/.before_refresh/modeling_chatglm.py"))
    (work / "executed").unlink()


def check_saved(folder: Path):
    for name, auto_map in AUTO_MAPS.items():
        found = json.loads((folder / name).read_bytes())["auto_map"]
        assert auto_map.items() <= found.items()
    for file in (*refresh.CODE_FILES, TINY / "tokenizer.model"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_the_package_saves_its_code(work):
    check_saved(work / "saved")


@pytest.mark.slow
def test_remote_code_saves_itself(work, remote):
    check_saved(work / "saved again")
    assert (work / "int8 saved" / "quantization.py").exists()
    fields = json.loads((work / "int8 saved" / "config.json").read_bytes())
    assert fields["quantization_bit"] == fields["quantization_config"]["bits"] == 8


@pytest.mark.parametrize("has_auto_map", [True, False])
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}], ids=["unset", "False"])
def test_registered_package_ignores_code_of_the_folder(work, tmp_path, has_auto_map, options):
    folder = shutil.copytree(work / "first", tmp_path / "poisoned")
    poison(folder, tmp_path / "executed")
    for name in () if has_auto_map else AUTO_MAPS:
        fields = json.loads((folder / name).read_bytes())
        del fields["auto_map"]
        (folder / name).write_text(json.dumps(fields))
    for auto_class, name in CLASSES.items():
        loaded = getattr(transformers, auto_class).from_pretrained(folder, **options)
        assert type(loaded) is getattr(chatglm2, name)
    chatglm2.ChatGLMForConditionalGeneration.from_pretrained(folder)
    chatglm2.ChatGLMTokenizer.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def get_package_modules() -> dict:
    return {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "chatglm2"}


def test_registering_twice_is_harmless(work):
    modules, folder = get_package_modules(), work / "first"
    try:
        for name in modules:
            del sys.modules[name]
        again = importlib.import_module("chatglm2")
        assert again is not chatglm2
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is again.ChatGLMForConditionalGeneration
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer) is again.ChatGLMTokenizer
    finally:
        for name in get_package_modules():
            del sys.modules[name]
        sys.modules.update(modules)
        importlib.reload(chatglm2)
    assert type(transformers.AutoConfig.from_pretrained(folder)) is chatglm2.ChatGLMConfig
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is chatglm2.ChatGLMForConditionalGeneration
