"""The configuration: the official fields and defaults, transformers' names, rotary parameters."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

from chatglm2 import ChatGLMConfig
from chatglm2.configuration_chatglm import AUTO_MAP

# The config.json of THUDM/chatglm2-6b, without what every config of the library has.
OFFICIAL_6B = """{
"model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": false,
"add_qkv_bias": true, "apply_query_key_layer_scaling": true, "attention_dropout": 0.0,
"apply_residual_connection_post_layernorm": false, "attention_softmax_in_fp32": true,
"bias_dropout_fusion": true, "ffn_hidden_size": 13696, "fp32_residual_connection": false,
"hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05,
"multi_query_attention": true, "multi_query_group_num": 2, "num_attention_heads": 32,
"num_layers": 28, "original_rope": true, "padded_vocab_size": 65024, "post_layer_norm": true,
"rmsnorm": true, "seq_length": 32768, "use_cache": true, "torch_dtype": "float16",
"tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0}"""
LIBRARY_NAMES = """{
"num_hidden_layers": 28, "vocab_size": 65024, "intermediate_size": 13696, "head_dim": 128,
"num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}"""


def test_official_config_keeps_its_fields_and_gets_the_librarys_names(tmp_path):
    (tmp_path / "config.json").write_text(OFFICIAL_6B)
    fields = json.loads(OFFICIAL_6B)
    del fields["torch_dtype"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ChatGLMConfig
    for name, value in (fields | json.loads(LIBRARY_NAMES)).items():
        assert getattr(config, name) == value, name
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert saved.items() >= {**fields, "dtype": "float16", "auto_map": AUTO_MAP}.items()
    again = ChatGLMConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": None}
    assert again == config.to_dict() | {"_name_or_path": None}


def test_class_defaults_are_the_originals():
    config = ChatGLMConfig()
    assert (config.seq_length, config.quantization_bit, config.pre_seq_len) == (2048, 0, None)
    assert not config.add_qkv_bias and not config.multi_query_attention
    assert config.multi_query_group_num == 1
    assert config.num_key_value_heads == config.num_attention_heads == 32


def test_rope_parameters_always_rotate_half_of_a_head():
    default = {"rope_type": "default", "rope_theta": 10000.0}
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    for given, expected in ((None, default), (yarn, yarn)):
        rope = ChatGLMConfig(rope_parameters=given).rope_parameters
        assert rope.items() >= {**expected, "partial_rotary_factor": 0.5}.items()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_layers": None}, "num_layers is None: give an integer from 1 to 1000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True: give an integer from 1 to"),
        ({"layernorm_epsilon": 3}, "layernorm_epsilon is 3: give a number from 1e-15 to 0.01"),
        ({"rope_ratio": math.nan}, "rope_ratio is nan: give a number from 0.01 to 1000"),
        ({"kv_channels": 6}, "kv_channels is 6: give a multiple of 4"),
        ({"eos_token_id": "2"}, "eos_token_id is '2': give an id or a list of ids, or null"),
        ({"eos_token_id": [2, 70000]}, r"eos_token_id is \[2, 70000\]: give ids below padded_voc"),
        ({"rmsnorm": 1}, "rmsnorm is 1: give true or false"),
        ({"dtype": "half"}, "dtype is 'half': give float16 or bfloat16 or float32 or float64"),
        ({"num_labels": 10**12}, "num_labels is 1000000000000: give an integer from 1 to"),
        ({"id2label": {"a": "b"}}, "id2label is {'a': 'b'}: give an object from numbers"),
        ({"multi_query_attention": True, "multi_query_group_num": 3}, "num_attention_heads is 32"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_parameters: rope_type is 'ntk'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' and no factor"),
        ({"quantization_bit": 3}, "quantization_bit is 3: give 0 or 4 or 8, or null"),
        ({"quantization_config": {"quant_method": "chatglm"}}, "quantization_config has no bits"),
        (
            {"quantization_config": {"quant_method": "chatglm", "bits": 4, "skip": []}},
            "quantization_config has a field 'skip'",
        ),
        ({"quantization_config": [4]}, r"quantization_config is \[4\]: give an object, or null"),
    ],
    ids=str,
)
def test_values_that_cannot_be_right(tmp_path, fields, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", **fields}))
    with pytest.raises(ValueError, match=expected):
        AutoConfig.from_pretrained(tmp_path)


def test_older_spellings(tmp_path):
    fields = {"torch_dtype": "torch.bfloat16", "rope_scaling": {"type": "linear", "factor": 2}}
    config = ChatGLMConfig.from_dict(fields)
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters.items() >= {"rope_type": "linear", "factor": 2}.items()


@pytest.mark.parametrize("prefix", ["", "_"])
def test_a_folder_chooses_no_code(tmp_path, prefix):
    """Kernels of the hub, methods of the class and another weight file."""
    fields = {f"{prefix}{what}_implementation": "kernels/evil" for what in ("attn", "experts")}
    fields |= {"to_dict": 1, "validate": None, "attribute_map": {}, "hidden_size": 8}
    sizes = ["num_layers", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size"]
    config = ChatGLMConfig.from_dict({**fields, **dict.fromkeys(sizes, 4), "kv_channels": 4})
    assert AutoModel.from_config(config).config._attn_implementation == "sdpa"
    assert config.to_dict()["hidden_size"] == 8
