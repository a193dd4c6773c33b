"""Damaged checkpoint folders are refused in one line."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_chatglm import CONFIG, TINY

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.weights_chatglm import check_weight_file, find_weight_files

load = ChatGLMForConditionalGeneration.from_pretrained
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:812edc55\nsize 1827781090\n"


@pytest.fixture
def state():
    return load_file(TINY / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def check_refusals(folder, file, contents: dict[bytes, str]):
    """Write each content into a file; loading its folder must print the message and the size."""
    for content, message in contents.items():
        file.write_bytes(content)
        with pytest.raises(OSError, match=message) as error:
            load(folder)
        assert str(error.value).startswith(f"{file} ({len(content)} bytes) is ")
        assert "\n" not in str(error.value)


def test_safetensors(folder, state):
    file = folder / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    check_weight_file(file)
    whole = file.read_bytes()
    damaged = [whole[:length] for length in (0, 5, 100, len(whole) - 1)]
    damaged += [bytes(len(whole)), whole[:8] + b"[1]" + whole[11:], whole + b"x"]
    check_refusals(folder, file, dict.fromkeys(damaged, "truncated or damaged: download it again"))
    check_refusals(folder, file, {POINTER: "a Git LFS pointer .* `git lfs pull`"})


def test_shards_of_pickles(folder, state):
    shard, index = folder / "pytorch_model-1.bin", folder / "pytorch_model.bin.index.json"
    damage = "damaged: download it again"
    check_refusals(folder, index, dict.fromkeys([b"{}", b"", b"[]"], damage))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard.name)}))
    assert find_weight_files(folder) == [shard]
    with pytest.raises(OSError, match=r"pytorch_model-1\.bin is missing: download it"):
        load(folder)
    torch.save(state, shard)
    assert zipfile.is_zipfile(shard)
    damaged = [b"<!DOCTYPE html>not found", bytes(100), shard.read_bytes()[:-1000]]
    check_refusals(folder, shard, {POINTER: "Git LFS"} | dict.fromkeys(damaged, damage))
    shard.write_bytes(b"\x80\x02" + pickle.dumps({})[2:])  # the format before torch 1.6
    check_weight_file(shard)


def test_no_config(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        load(tmp_path)
