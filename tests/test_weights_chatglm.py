"""Damaged checkpoint folders are refused in one line."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_chatglm import CONFIG, TINY

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.weights_chatglm import check_weight_file, find_weight_files

load = ChatGLMForConditionalGeneration.from_pretrained
STATE = load_file(TINY / "model.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:812edc55\nsize 1827781090\n"
DAMAGE = "damaged: download it again"


@pytest.fixture
def folder(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def check_refusals(file, *contents: bytes, message=DAMAGE):
    """Write each content into a file; loading its folder must print the message and the size."""
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(OSError, match=message) as error:
            load(file.parent)
        assert str(error.value).startswith(f"{file} ({len(content)} bytes) is ")
        assert "\n" not in str(error.value)


def test_safetensors(folder):
    file = folder / "model.safetensors"
    save_file(STATE, file, metadata={"format": "pt"})
    check_weight_file(file)
    whole = file.read_bytes()
    check_refusals(file, *[whole[:length] for length in (0, 5, 100, len(whole) - 1)])
    check_refusals(file, bytes(len(whole)), whole[:8] + b"[1]" + whole[11:], whole + b"x")
    check_refusals(file, POINTER, message="a Git LFS pointer .* `git lfs pull`")


def test_shards_of_pickles(folder):
    shard, index = folder / "pytorch_model-1.bin", folder / "pytorch_model.bin.index.json"
    check_refusals(index, b"{}", b"", b"[]")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, shard.name)}))
    assert find_weight_files(folder) == [shard]
    with pytest.raises(OSError, match=r"pytorch_model-1\.bin is missing: download it"):
        load(folder)
    torch.save(STATE, shard)
    check_weight_file(shard)
    check_refusals(shard, b"<!DOCTYPE html>", bytes(100), shard.read_bytes()[:-1000])
    check_refusals(shard, POINTER, message="Git LFS")
    shard.write_bytes(b"\x80\x02" + pickle.dumps({})[2:])  # the format before torch 1.6
    check_weight_file(shard)
