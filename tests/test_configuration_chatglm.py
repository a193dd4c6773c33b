"""The configuration: the official fields and defaults, transformers' names, rotary parameters."""

import json

import pytest
from transformers import AutoConfig

from chatglm2 import ChatGLMConfig
from chatglm2.configuration_chatglm import AUTO_MAP

# The config.json of THUDM/chatglm2-6b, without what every config of the library has.
OFFICIAL_6B = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_official_config_keeps_its_fields_and_gets_the_librarys_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_6B))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ChatGLMConfig
    for name, value in OFFICIAL_6B.items():
        if name != "torch_dtype":
            assert getattr(config, name) == value, name
    names = {
        "num_hidden_layers": 28,
        "vocab_size": 65024,
        "intermediate_size": 13696,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    }
    for name, value in names.items():
        assert getattr(config, name) == value, name
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert saved["dtype"] == "float16"
    assert saved["auto_map"] == AUTO_MAP
    assert saved.items() >= {k: v for k, v in OFFICIAL_6B.items() if k != "torch_dtype"}.items()
    again = ChatGLMConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": None}
    assert again == config.to_dict() | {"_name_or_path": None}


def test_class_defaults_are_the_originals():
    config = ChatGLMConfig()
    assert config.seq_length == 2048
    assert config.add_qkv_bias is False
    assert config.multi_query_attention is False
    assert config.multi_query_group_num == 1
    assert config.num_key_value_heads == config.num_attention_heads == 32
    assert config.pre_seq_len is None and config.quantization_bit == 0


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}},
            {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
        ),
    ],
)
def test_rope_parameters_always_rotate_half_of_a_head(given, expected):
    rope = ChatGLMConfig(**given).rope_parameters
    assert rope.items() >= {**expected, "partial_rotary_factor": 0.5}.items()
