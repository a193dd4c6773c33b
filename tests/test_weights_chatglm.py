"""Damaged checkpoint folders are refused in one line."""

import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_modeling_chatglm import CONFIG, TINY

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm2.placement import create_empty_model
from chatglm2.weights_chatglm import (
    check_inside,
    check_weight_file,
    check_weights,
    find_weight_files,
    read_all_shapes,
)

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


# Files that lie.

MODEL = create_empty_model(ChatGLMConfig(**CONFIG))
NAME = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
WEIGHT = STATE[NAME]
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


def refuse(folder, model=MODEL) -> str:
    """Return the one line about a folder's weights."""
    with pytest.raises((OSError, ValueError)) as error:
        check_weights(read_all_shapes(folder), model)
    assert "\n" not in str(error.value)
    return str(error.value)


class Call:
    """Is pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is of the type int"),
        (None, "is of the type NoneType"),
        ({"weight": WEIGHT}, "is of the type dict"),
        (WEIGHT.to_sparse(), "something else than tensors"),
        (WEIGHT.to("meta"), "something else than tensors"),
        (WEIGHT.to(torch.float8_e4m3fn), "something else than tensors"),
        (WEIGHT[:1].clone().expand(WEIGHT.shape), "repeats its data"),
        (WEIGHT.long(), "1 tensors are missing, unknown or of another shape or dtype, among them"),
        (WEIGHT[:-1], "of another shape"),
        (torch.zeros(0, 2**50), "of another shape"),
        (WEIGHT.repeat(9, 9).T.as_strided(WEIGHT.shape, (0, 1)), "repeats its data"),
        (Call(os.mkdir, "executed"), "something else than tensors, 'posix.mkdir'"),
        (Call(bytearray, 10**12), "something else than tensors, '__builtin__.bytearray'"),
        (Call(torch.Tensor, 10**12), "something else than tensors, 'torch.Tensor'"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_values_in_a_pickle(tmp_path, monkeypatch, value, message, is_zip):
    monkeypatch.chdir(tmp_path)
    for state in (STATE, {k: torch.nn.Parameter(v) for k, v in STATE.items()}):
        torch.save(state, BIN, _use_new_zipfile_serialization=is_zip)
        check_weights(read_all_shapes(tmp_path), MODEL)
    torch.save(STATE | {NAME: value}, BIN, _use_new_zipfile_serialization=is_zip)
    assert message in refuse(tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "value", [[STATE], WEIGHT, None, {3: WEIGHT}, {"state_dict": STATE}, MODEL]
)
def test_pickles_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / BIN)
    assert "holds something else than" in refuse(tmp_path)


def test_tensors_that_are_larger_than_their_file(tmp_path):
    """Several names for one tensor, and a pickle that is compressed."""
    data = torch.zeros(WEIGHT.shape)
    torch.save({f"{i}": data[:] for i in range(99)}, tmp_path / BIN)
    assert "holds tensors of" in refuse(tmp_path)
    with zipfile.ZipFile(tmp_path / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    assert "is truncated or damaged" in refuse(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "before torch 1.6"])
def test_flipped_bits(tmp_path, kind):
    """A flipped bit in the description of the tensors is refused, or changes no shape."""
    file = tmp_path / (SAFETENSORS if kind == "safetensors" else BIN)
    if kind == "safetensors":
        save_file(STATE, file, metadata={"format": "pt"})
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=kind == "zip")
    whole, refused, choose = file.read_bytes(), 0, random.Random(0)
    for _ in range(150):
        position = choose.choice((choose.randrange(3000), -choose.randrange(1, 3000)))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        try:
            check_weights(read_all_shapes(tmp_path), MODEL)
        except (OSError, ValueError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40


def test_quantized_weights(tmp_path):
    """Weights and scales of a wrong dtype or shape."""
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG)).quantize(4)
    model.save_pretrained(tmp_path)
    file, scale = tmp_path / SAFETENSORS, NAME.replace("weight", "weight_scale")
    state = load_file(file)
    empty = create_empty_model(model.config)
    check_weights(read_all_shapes(tmp_path), empty)
    for changed in (
        {NAME: state[NAME].float()},
        {NAME: state[NAME].view(torch.uint8)},
        {NAME: state[NAME][:, 1:].contiguous()},
        {scale: state[scale].long()},
        {scale: state[scale][:, None].contiguous()},
    ):
        save_file(state | changed, file)
        assert f"among them {next(iter(changed))}" in refuse(tmp_path, empty)
    assert "unknown" in refuse(tmp_path)
    save_file(STATE, file)
    assert "weights are not quantized, but its config says" in refuse(tmp_path, empty)


SHARD = "model-1.safetensors"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "is damaged"),
        ([], "is damaged"),
        ({"metadata": {}, "weight_map": None}, "is damaged"),
        ({"metadata": {}, "weight_map": [SHARD]}, "is damaged"),
        ({"metadata": {}, "weight_map": {}}, "is damaged"),
        ({"metadata": {}, "weight_map": {NAME: 3}}, "is damaged"),
        ({"metadata": {}, "weight_map": {NAME: [SHARD]}}, "is damaged"),
        ({"weight_map": dict.fromkeys(STATE, SHARD)}, "has no metadata"),
        ({"metadata": [], "weight_map": dict.fromkeys(STATE, SHARD)}, "has no metadata"),
        ({"metadata": {}, "weight_map": {"other": SHARD}}, f"{SHARD} lacks 'other'"),
        *(
            ({"metadata": {}, "weight_map": {NAME: name}}, f"{message}")
            for name, message in {
                "none.safetensors": "is missing",
                "pipe.safetensors": "is no regular file",
                "folder.safetensors": "is no regular file",
                "loop.safetensors": "is missing",
                "zero.safetensors": "leads to /dev/zero",
                "out.safetensors": "leads to ",
                f"../{SHARD}": "allowed are *.safetensors files of its folder",
                f"x/../{SHARD}": "allowed are",
                "/dev/zero": "allowed are",
                BIN: "allowed are",
                "": "allowed are",
                "\0.safetensors": r"'\x00.safetensors': allowed are",
            }.items()
        ),
    ],
)
def test_indexes(tmp_path, fields, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in (tmp_path / SHARD, folder / SHARD):
        save_file(STATE, path)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    for name, target in {
        "loop": "loop.safetensors",
        "zero": "/dev/zero",
        "out": f"../{SHARD}",
    }.items():
        (folder / f"{name}.safetensors").symlink_to(target)
    (folder / "model.safetensors.index.json").write_text(json.dumps(fields))
    assert message in refuse(folder)


def test_links_of_the_hub_cache(tmp_path):
    """A snapshot links to blobs of its own model, also where the cache itself is a link."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "sha"
    blob = snapshot.parent.parent / "blobs" / "1"
    for folder in (snapshot, blob.parent, tmp_path / "models"):
        folder.mkdir(parents=True)
    save_file(STATE, blob)
    (snapshot / SAFETENSORS).symlink_to("../../blobs/1")
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    for path in (snapshot, tmp_path / "link" / snapshot.relative_to(tmp_path / "hub")):
        check_weights(read_all_shapes(path), MODEL)
    copy = tmp_path / "models" / SAFETENSORS
    copy.symlink_to(blob)
    with pytest.raises(OSError, match="out of its folder"):
        check_inside(copy.parent, copy)
