"""The JSON files of a checkpoint: every field with values of every kind, and damaged files."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from loading import fail_to_load, load

from chatglm2 import ChatGLMConfig, json_files
from chatglm2.configuration_chatglm import LibraryFields
from chatglm2.recognition import check_kind, check_shapes

VALUES = [None, True, 0, -1, 3, 2.5, 1e-12, "2", "", [], ["x"], [[1]], {}, {"a": 1}]
VALUES += [math.nan, math.inf, -math.inf, 10**12, 1e12, 2**63, "kernels-community/flash-attn"]
MAX_LOADED = 12  # models for each file, because each takes 0.2 s
FIELDS = {
    "config.json": {
        *(
            field.name
            for kind in (ChatGLMConfig, LibraryFields)
            for field in dataclasses.fields(kind)
        ),
        *ChatGLMConfig.attribute_map,
        *[
            "model_type",
            "num_key_value_heads",
            "layer_types",
            "per_layer_config",
            "validate",
            "to_dict",
        ],
        *["attn_implementation", "_attn_implementation", "experts_implementation"],
        *["transformers_weights", "configuration_files", "name_or_path", "unknown"],
    },
    "generation_config.json": {
        *(field.name for field in dataclasses.fields(json_files.GenerationFields)),
        *["watermarking_config", "compile_config", "cache_config", "validate", "unknown"],
    },
    "tokenizer_config.json": {
        *(field.name for field in dataclasses.fields(json_files.TokenizerFields)),
        *["self", "encode", "vocab_file", "name_or_path", "tokenizer_file", "backend", "unknown"],
    },
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def read_all(folder: Path):
    """Do all that comes before the weights are loaded."""
    check_kind(folder)
    config = json_files.read_config(folder)
    json_files.read_generation_config(folder)
    json_files.check_tokenizer_files(folder)
    check_shapes(folder, config)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_with_every_kind_of_value(checkpoint, name):
    """A value is refused in one line that names file and field, or the model loads and answers."""
    path, loaded = checkpoint / name, set()
    fields = json.loads(path.read_text("utf-8"))
    for field in sorted({*fields, *FIELDS[name]}):
        for value in VALUES:
            path.write_text(json.dumps({**fields, field: value}))
            case = f"{field}: {value!r}"
            try:
                read_all(checkpoint)
            except ValueError as error:
                line = str(error)
                assert "\n" not in line and len(line) < 600, case
                assert field in line or "do not belong to config.json" in line, (case, line)
                continue
            if value is not None and field not in loaded and len(loaded) < MAX_LOADED:
                loaded.add(field)
                try:
                    tokenizer, model = load(checkpoint)
                except SystemExit as error:
                    assert "\n" not in str(error), case
                    continue
                assert model.chat(tokenizer, "hi", do_sample=False, max_new_tokens=1)[0], case


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("config.json", b"\xff", "config.json is not in UTF-8"),
        ("config.json", b'{"a":' * 10**5, "config.json is not valid JSON (maximum recursion"),
        ("config.json", b'{"num_layers": ' + b"9" * 5000 + b"}", "config.json is not valid JSON"),
        ("config.json", b'{"num_layers": 4, "num_layers": 5}', "'num_layers' is given twice"),
        ("generation_config.json", b"nothing", "generation_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds no JSON object"),
        ("special_tokens_map.json", b'{"eos_token": 2}', "special_tokens_map.json: eos_token is 2"),
        ("added_tokens.json", b'{"a": "b"}', "added_tokens.json: added_tokens is {'a': 'b'}"),
        ("tokenizer.json", b"{}", "tokenizer.json: added_tokens is None: give a list of tokens"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not in UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_damaged_file(checkpoint, name, content, expected):
    (checkpoint / name).write_bytes(content)
    assert expected in fail_to_load(checkpoint)


def test_file_without_an_end(checkpoint):
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to("/dev/zero")
    assert "config.json is no regular file" in fail_to_load(checkpoint)


def test_many_names(checkpoint):
    """A file of many names takes no more than linear time."""
    names = {f"name {i}": i for i in range(200_000)}
    (checkpoint / "generation_config.json").write_text(json.dumps(names))
    json_files.read_generation_config(checkpoint)
