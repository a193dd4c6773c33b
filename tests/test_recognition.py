"""`recognition`: other models and adapters are named, and fine-tuned ChatGLM2 models load."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from loading import fail_to_load, load
from safetensors.torch import load_file, save_file

from chatglm2 import export, refresh

ROLES = "[gMASK]sop{% for m in messages %}<|{{ m['role'] }}|>\n {{ m['content'] }}{% endfor %}"
ZEPHYR = "{% for m in messages %}<|user|>\n{{ m['content'] }}{% endfor %}"
TIKTOKEN = b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))
LORA = {"peft_type": "LORA", "base_model_name_or_path": "THUDM/chatglm2-6b"}
PREFIX = {"transformer.prefix_encoder.embedding.weight": torch.zeros(8, 4 * 2 * 2 * 32)}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled checkpoint whose files can be changed."""
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def change(folder: Path, name: str, content):
    """Replace a file by bytes, or fields of a JSON file; `None` deletes it."""
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        fields = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(fields | content), "utf-8")


def rename_tensors(folder: Path, function):
    path = folder / "model.safetensors"
    save_file({function(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config.json": {"_name_or_path": "THUDM/chatglm3-6b"}}, "so it is ChatGLM3"),
        ({"tokenizer_config.json": {"name_or_path": "/models/chatglm3-6b-32k"}}, "is ChatGLM3"),
        ({"tokenizer_config.json": {"chat_template": ROLES}}, "so it is ChatGLM3"),
        ({"chat_template.jinja": ROLES.encode()}, "so it is ChatGLM3"),
        ({"tokenization_chatglm.py": b'"<|observation|>"'}, "so it is ChatGLM3"),
        ({"tokenizer.model": TIKTOKEN}, "is a vocabulary of tiktoken, so it is GLM-4"),
        ({"config.json": {"_name_or_path": "THUDM/codegeex2-6b"}}, "so it is CodeGeeX2"),
        ({"config.json": {"inner_hidden_size": 16384}}, "perhaps the first ChatGLM-6B"),
        ({"config.json": {"model_type": "glm"}}, "transformers' own GLM"),
        ({"config.json": {"model_type": "qwen2"}}, "has model_type 'qwen2', not 'chatglm'"),
        ({"config.json": None, "model.safetensors": None, "adapter_config.json": LORA}, "a LoRA"),
        ({"adapter_config.json": LORA}, "holds a model and a LoRA adapter"),
    ],
    ids=str,
)
def test_other_models_are_named(checkpoint, tmp_path, capsys, changes, expected):
    for name, content in changes.items():
        change(checkpoint, name, content)
    assert expected in fail_to_load(checkpoint)
    for command in (
        lambda: refresh.main([str(checkpoint)]),
        lambda: export.main([str(checkpoint), str(tmp_path / "glm")]),
    ):
        with pytest.raises(SystemExit) as error:
            command()
        if "config.json" not in changes or changes["config.json"]:
            assert expected in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"config.json": {"_name_or_path": "/runs/chatglm3-vs/chatglm2-6b"}},
        {"config.json": {"_name_or_path": "output/my-tuned-model"}},
        {"tokenizer_config.json": {"chat_template": ZEPHYR}},
    ],
    ids=str,
)
def test_fine_tuned_models_load(checkpoint, changes):
    for name, content in changes.items():
        change(checkpoint, name, content)
    load(checkpoint)


def test_copy_in_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / "models--THUDM--codegeex2-6b" / "snapshots" / "0123"
    assert "is a copy of THUDM/codegeex2-6b" in fail_to_load(shutil.copytree(TINY, folder))
    load(shutil.copytree(TINY, tmp_path / "chatglm3-renamed"))


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_prefix_is_no_model(checkpoint, has_tokenizer):
    (checkpoint / "model.safetensors").unlink()
    torch.save(PREFIX, checkpoint / "pytorch_model.bin")
    change(checkpoint, "config.json", {"pre_seq_len": 8})
    if not has_tokenizer:
        (checkpoint / "tokenizer.model").unlink()
    line = fail_to_load(checkpoint)
    assert "is a P-Tuning v2 prefix" in line and f"--adapter {checkpoint}" in line


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [("module.", "use its .module"), ("base_model.model.", "merge_and_unload()")],
)
def test_names_of_a_wrapped_model(checkpoint, beginning, expected):
    rename_tensors(checkpoint, lambda name: beginning + name)
    line = fail_to_load(checkpoint)
    assert f"all tensor names begin with '{beginning}'" in line and expected in line


def test_tensors_without_a_place(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | PREFIX, path)
    assert "set pre_seq_len to 8" in fail_to_load(checkpoint)
    save_file(tensors | {"transformer.encoder.layers.0.more": torch.zeros(1)}, path)
    assert "1 tensors have no place in the model" in fail_to_load(checkpoint)
