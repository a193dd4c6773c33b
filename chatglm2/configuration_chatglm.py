"""Configuration of ChatGLM2: the fields of the official `config.json`, under their official names.

`attribute_map` adds the names that transformers uses (`num_hidden_layers`, `vocab_size`, ...) for
its caches, rotary scaling and other tools. This file is also Hugging Face remote code.
"""

from typing import ClassVar

import transformers
from packaging.version import Version

TRANSFORMERS_RANGE = ("5.21", "5.24")  # minor versions that `tests/versions.py` passed with


def check_transformers():
    """Check that this code was tested with the installed transformers.

    The remote-code files that may be imported first call this before they import names that other
    versions lack.

    Raises:
        ImportError: transformers is older or newer.
    """
    oldest, newest = TRANSFORMERS_RANGE
    installed = Version(transformers.__version__).release[:2]
    if not Version(oldest).release <= installed <= Version(newest).release:
        raise ImportError(
            f"ChatGLM2 needs transformers {oldest} to {newest}, found {transformers.__version__}: "
            f"pip install 'transformers=={newest}.*'"
        )


check_transformers()

from transformers import PreTrainedConfig  # noqa: E402

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


class ChatGLMConfig(PreTrainedConfig):
    """The shape of a ChatGLM2 model.

    Class defaults are the original's; the 6B checkpoint overrides `seq_length` (32768),
    `add_qkv_bias` (True), `multi_query_attention` (True) and `multi_query_group_num` (2) in its
    `config.json`.

    Attributes:
        kv_channels: Size of one attention head.
        multi_query_group_num: Number of key/value heads if `multi_query_attention`.
        seq_length: The context: the longest sequence, prompt and answer together, in tokens.
        pre_seq_len: Length of a trained P-Tuning v2 prefix; `None` for a model without a prefix.
        prefix_projection: The prefix is computed by a two-layer MLP.
        rope_ratio: Positions are divided by it (the 32K model; linear position interpolation).
        rope_parameters: The dictionary of transformers (`rope_type` default, linear, dynamic or
            yarn; `rope_theta`, `factor`, ...). Always half of each head is rotated. "dynamic"
            changes only positions beyond `seq_length`, which chat does not reach.
        original_rope, apply_query_key_layer_scaling, attention_softmax_in_fp32,
            bias_dropout_fusion: Fields of the official file for other tools; without effect here.
        quantization_bit: 4 or 8 in a quantized checkpoint, else 0. `quantization_config`, which
            transformers reads, follows from it, because official checkpoints lack it.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    attention_dropout: float | int = 0.0
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    quantization_bit: int | None = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    original_rope: bool = True
    rope_ratio: float | int = 1
    rope_parameters: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    auto_map: dict | None = None

    def __post_init__(self, **kwargs):
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        kwargs["partial_rotary_factor"] = 0.5
        quantization = dict(kwargs.get("quantization_config") or {})
        if quantization.get("quant_method") == "chatglm":
            self.quantization_bit = quantization["bits"]
        elif self.quantization_bit and not quantization:
            kwargs["quantization_config"] = {"quant_method": "chatglm"}
            kwargs["quantization_config"] |= {"bits": self.quantization_bit, "group_size": None}
        super().__post_init__(**kwargs)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads: one for each query head without multi-query attention."""
        if self.multi_query_attention:
            return self.multi_query_group_num
        return self.num_attention_heads


ChatGLMConfig.register_for_auto_class()
