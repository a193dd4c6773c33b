"""The package's files as Hugging Face remote code, and the registered package against foreign code.

One other process, which cannot import this project, loads every kind of folder with
trust_remote_code=True; what it computes is compared with the package itself.
"""

import importlib
import inspect
import json
import os
import re
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

import chatglm2
from chatglm2 import refresh
from chatglm2.configuration_chatglm import AUTO_MAP

MODEL_CLASSES = {
    "AutoModel": "ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "ChatGLMForSequenceClassification",
}
TOKENIZER_CONFIG = {
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": AUTO_MAP,
    "add_qkv_bias": True,
    "ffn_hidden_size": 48,
    "hidden_size": 32,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 4096,
    "seq_length": 256,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HUB_NAME, COMMIT = "THUDM/chatglm2-6b", "d" * 40
CODE_NAMES = [file.name for file in refresh.CODE_FILES]


def probe(model, tokenizer) -> dict:
    """Return logits and answers of a model as plain data."""
    import torch

    inputs = tokenizer(["你好", "Where do you live?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.tolist()
    greedy = {"do_sample": False, "max_new_tokens": 6}
    response, history = model.chat(tokenizer, "你好", **greedy)
    first = [text for text, _ in model.stream_chat(tokenizer, "你好", **greedy)]
    turns = list(model.stream_chat(tokenizer, "你好", return_past_key_values=True, **greedy))
    turns += model.stream_chat(
        tokenizer, "Again?", history, turns[-1][2], return_past_key_values=True, **greedy
    )
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

    def load(name, auto_class="AutoModel", **more):
        options = {"trust_remote_code": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        options |= {"dtype": torch.float32, **more}
        return getattr(transformers, auto_class).from_pretrained(name, **options), tokenizer

    def describe(model, tokenizer):
        module = sys.modules[type(model).__module__]
        return probe(model, tokenizer) | {
            "modules": [type(x).__module__ for x in (model, model.config, tokenizer)],
            "origin": getattr(module, "ORIGIN", None),
        }

    work = Path(work)
    first = load(work / "first" / "checkpoint", "AutoModelForCausalLM")
    second = load(work / "second" / "checkpoint")
    results = {"first": describe(*first), "second": describe(*second)}
    results["hub"] = describe(*load("THUDM/chatglm2-6b"))
    results["bundled"] = describe(*load(work / "bundled" / "checkpoint"))
    results["saved"] = describe(*load(work / "saved"))
    for part in first:
        part.save_pretrained(work / "saved again")
    results["saved again"] = describe(*load(work / "saved again"))
    results["first, still"] = describe(*first)
    results["int4"] = describe(*load(work / "int4"))
    quantization = {"quant_method": "chatglm", "bits": 8}
    quantized = load(work / "second" / "checkpoint", quantization_config=quantization)
    results["int8"] = describe(*quantized)
    for part in quantized:
        part.save_pretrained(work / "int8 saved")
    results["int8 saved"] = describe(*load(work / "int8 saved"))
    results["classes"] = {
        name: type(load(work / "first" / "checkpoint", name)[0]).__name__
        for name in ("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification")
    }
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


def write_data(folder: Path, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG), "utf-8")
    shutil.copy(TINY / "tokenizer.model", folder)


def write_shards(folder: Path, weights: dict[str, torch.Tensor]):
    """Write `.bin` shards and their index, with the buffer of the official checkpoint."""
    weights = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2), **weights}
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": list(weights)[i::3] for i in range(3)}
    for file, names in shards.items():
        torch.save({name: weights[name].clone() for name in names}, folder / file)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in weights.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_int4(folder: Path, source: Path):
    """Write an INT4 checkpoint as the official one is: `.bin`, only quantization_bit."""
    config = CONFIG | {"quantization_bit": 4, "torch_dtype": "float16"}
    write_data(folder, config)
    model = chatglm2.ChatGLMForConditionalGeneration.from_pretrained(source, dtype=torch.float16)
    write_shards(folder, model.quantize(4).state_dict())
    for file in refresh.CODE_FILES:
        shutil.copy(file, folder)


def poison(folder: Path, marker: Path):
    """Write code files that leave `marker` when they are executed."""
    for name in (*CODE_NAMES, "__init__.py"):
        text = f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('{name} was executed')\n"
        (folder / name).write_text(text)


def write_snapshot(hub: Path, source: Path) -> Path:
    """Write a folder as the Hugging Face cache holds it, links to blobs."""
    repo = hub / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, repo / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i}"))
    return snapshot


def refresh_snapshot(modules: Path, snapshot: Path):
    """Refresh a snapshot whose old code transformers has copied already, in a failed attempt."""
    copies = modules / "transformers_modules" / "THUDM" / "chatglm2_hyphen_6b" / COMMIT
    copies.mkdir(parents=True)
    for name in CODE_NAMES:
        shutil.copy(snapshot / name, copies / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
        refresh.main([str(snapshot)])


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_checkpoint) -> Path:
    """A folder of checkpoints: by hand, refreshed, from the hub, saved by the package, bundled."""
    work = tmp_path_factory.mktemp("remote code")
    marker = work / "executed"
    first, second = work / "first" / "checkpoint", work / "second" / "checkpoint"
    for folder in (first, second):
        write_data(folder)
    safetensors.torch.save_file(random_weights(1), first / "model.safetensors", {"format": "pt"})
    for file in refresh.CODE_FILES:
        shutil.copy(file, first)

    write_shards(second, random_weights(2))
    poison(second, marker)
    snapshot = write_snapshot(work / "hub", second)
    refresh_snapshot(work / "modules", snapshot)
    refresh.main([str(second)])
    with open(second / "modeling_chatglm.py", "a") as file:
        file.write('\nORIGIN = "second"\n')
    write_int4(work / "int4", first)

    shutil.copytree(tiny_checkpoint, work / "bundled" / "checkpoint")
    refresh.main([str(work / "bundled" / "checkpoint")])

    model = chatglm2.ChatGLMForConditionalGeneration.from_pretrained(first)
    model.save_pretrained(work / "saved")
    chatglm2.ChatGLMTokenizer.from_pretrained(first).save_pretrained(work / "saved")
    return work


@pytest.fixture(scope="module")
def remote(work) -> dict:
    """The results of `load_as_remote_code`."""
    script = work / "load.py"
    functions = "\n\n".join(inspect.getsource(f) for f in (probe, load_as_remote_code))
    script.write_text(f"{functions}\n\nload_as_remote_code({str(work)!r})\n", "utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_MODULES_CACHE": str(work / "modules"),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=work,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
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
    ("name", "source", "bits"),
    [
        ("first", "first/checkpoint", 0),
        ("second", "second/checkpoint", 0),
        ("hub", "second/checkpoint", 0),
        ("bundled", "bundled/checkpoint", 0),
        ("saved", "first/checkpoint", 0),
        ("saved again", "first/checkpoint", 0),
        ("first, still", "first/checkpoint", 0),
        ("int4", "int4", 0),
        ("int8", "second/checkpoint", 8),
        ("int8 saved", "second/checkpoint", 8),
    ],
)
def test_remote_code_computes_what_the_package_does(work, remote, name, source, bits):
    expected, result = probe_package(work / source, bits), remote[name]
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    logits, expected_logits = (torch.tensor(x["logits"]) for x in (result, expected))
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    assert result["chat"] == expected["chat"]
    assert result["streams"] == expected["streams"]
    response, (first, second) = result["chat"][0], result["streams"]
    assert response and first[-1] == response and response in second and len(second) > len(first)


@pytest.mark.slow
def test_two_folders_in_one_process(remote):
    assert remote["first"]["logits"] != remote["second"]["logits"]
    assert remote["first"]["logits"] == remote["first, still"]["logits"]
    assert remote["first"]["modules"] != remote["second"]["modules"]
    origins = [remote[name]["origin"] for name in ("first", "second", "first, still")]
    assert origins == [None, "second", None]
    assert len(remote["classes"]) == 2 and remote["classes"].items() <= MODEL_CLASSES.items()


@pytest.mark.slow
def test_old_code_is_not_executed(work, remote):
    assert not (work / "executed").exists()
    with pytest.raises(RuntimeError, match="was executed"):  # it would have been noticed
        runpy.run_path(str(work / "second/checkpoint/.before_refresh/modeling_chatglm.py"))
    (work / "executed").unlink()


def check_saved(folder: Path):
    fields = json.loads((folder / "config.json").read_bytes())
    assert AUTO_MAP.items() <= fields["auto_map"].items()
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert tokenizer_config["auto_map"] == TOKENIZER_CONFIG["auto_map"]
    for file in refresh.CODE_FILES:
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert (folder / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_the_package_saves_its_code(work):
    check_saved(work / "saved")


@pytest.mark.slow
def test_remote_code_saves_itself(work, remote):
    check_saved(work / "saved again")
    assert (work / "int8 saved" / "quantization.py").exists()
    fields = json.loads((work / "int8 saved" / "config.json").read_bytes())
    assert fields["quantization_bit"] == fields["quantization_config"]["bits"] == 8


@pytest.fixture
def poisoned(work, tmp_path, request) -> Path:
    """A checkpoint folder with code that would create the file `executed` beside the folder."""
    folder = tmp_path / "poisoned"
    shutil.copytree(work / "first" / "checkpoint", folder)
    poison(folder, tmp_path / "executed")
    if not request.param:
        for name in ("config.json", "tokenizer_config.json"):
            fields = json.loads((folder / name).read_bytes())
            del fields["auto_map"]
            (folder / name).write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("poisoned", [True, False], ids=["auto_map", "no auto_map"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}], ids=["unset", "False"])
def test_registered_package_ignores_code_of_the_folder(poisoned, options):
    classes = MODEL_CLASSES | {"AutoConfig": "ChatGLMConfig", "AutoTokenizer": "ChatGLMTokenizer"}
    for auto_class, name in classes.items():
        loaded = getattr(transformers, auto_class).from_pretrained(poisoned, **options)
        assert type(loaded) is getattr(chatglm2, name)
    chatglm2.ChatGLMForConditionalGeneration.from_pretrained(poisoned)
    chatglm2.ChatGLMTokenizer.from_pretrained(poisoned)
    assert not (poisoned.parent / "executed").exists()


def get_package_modules() -> dict:
    return {name: m for name, m in sys.modules.items() if re.match(r"chatglm2(\.|$)", name)}


def test_registering_twice_is_harmless(work):
    folder = work / "first" / "checkpoint"
    importlib.reload(chatglm2)
    assert type(transformers.AutoModel.from_pretrained(folder)) is getattr(
        chatglm2, MODEL_CLASSES["AutoModel"]
    )
    modules = get_package_modules()
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
