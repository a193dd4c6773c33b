"""Configuration of ChatGLM2: the fields of the official `config.json`, under their official names.

`attribute_map` adds the names that transformers uses (`num_hidden_layers`, `vocab_size`, ...) for
its caches, rotary scaling and other tools. Each field declares its type and its allowed values;
Hugging Face's strict dataclasses check them. This file is also Hugging Face remote code.
"""

import reprlib
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin

import transformers
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
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
from transformers.utils import logging  # noqa: E402

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
MAX_CONTEXT = 2**24  # tokens
MAX_ID = 2**31 - 1
DTYPES = ("float16", "bfloat16", "float32", "float64")
KINDS = {bool: "true or false", str: "a text", dict: "an object", list: "a list"}


# Fields with allowed values. The annotation of a field says whether it may be `None`.


def checked(allowed: str, is_allowed, default=MISSING):
    """Return a field of a strict dataclass for values of the annotated type that `is_allowed`.

    Args:
        allowed: The allowed values in words, for an error message.
    """

    def validator(value):
        if value is not None and not is_allowed(value):
            raise ValueError(f"{reprlib.repr(value)} is not allowed: give {allowed}")

    return validated_field(validator, default=default, metadata={"allowed": allowed})


def number(low, high, default=MISSING, noun="a number"):
    return checked(f"{noun} from {low} to {high}", lambda value: low <= value <= high, default)


def integer(low, high, default=MISSING):
    return number(low, high, default, "an integer")


def choice(*values, default=MISSING):
    return checked(" or ".join(map(str, values)), lambda value: value in values, default)


def id_or_ids(default=MISSING):
    def is_allowed(value):
        ids = value if isinstance(value, list) else [value]
        return ids != [] and all(0 <= i <= MAX_ID for i in ids)

    return checked("an id or a list of ids", is_allowed, default)


def dtype_name(default=MISSING):
    return checked(
        " or ".join(DTYPES), lambda value: str(value).removeprefix("torch.") in DTYPES, default
    )


def describe_allowed(field: Field) -> str:
    """Return the allowed values of a field in words."""
    kinds = [kind for kind in get_args(field.type) or [field.type] if kind is not NoneType]
    words = field.metadata.get("allowed")
    words = words or " or ".join(KINDS.get(get_origin(kind) or kind, str(kind)) for kind in kinds)
    return f"{words}, or null" if NoneType in get_args(field.type) else words


def check_fields(cls, values: dict, place=""):
    """Check values for the fields of a strict dataclass; other names are ignored.

    Args:
        place: What the fields stand in, such as "rope_parameters: ", for an error message.

    Raises:
        ValueError: A value is not allowed; the message is one line that names the field, the value
            and the allowed ones.
    """
    described = {field.name: field for field in fields(cls)}
    instance = cls.__new__(cls)  # an assignment is checked, and needs no other value
    for name, value in select_fields(cls, values).items():
        own_name = getattr(cls, "attribute_map", {}).get(name, name)
        try:
            setattr(instance, own_name, value)
        except StrictDataclassError as error:
            allowed = describe_allowed(described[own_name])
            raise ValueError(f"{place}{name} is {reprlib.repr(value)}: give {allowed}") from error


def select_fields(cls, values: dict) -> dict:
    """Return the values that belong to the fields of a dataclass, or to their other names."""
    names = {field.name for field in fields(cls)} | {*getattr(cls, "attribute_map", {})}
    return {name: value for name, value in values.items() if name in names}


def find_implementations(config_dict: dict) -> list[str]:
    """Return the fields of a config.json that choose kernels, which transformers may download."""
    return sorted(x for x, value in config_dict.items() if "_implementation" in x and value)


@strict
@dataclass
class RopeFields:
    """The fields of `rope_parameters`, and of `rope_scaling` in older files."""

    rope_type: str = choice("default", "linear", "dynamic", "yarn")
    rope_theta: float | int = number(100, 1e10)
    partial_rotary_factor: float = choice(0.5)
    factor: float | int | None = number(1, 1000)
    original_max_position_embeddings: int = integer(1, MAX_CONTEXT)
    attention_factor: float | int | None = number(1e-3, 100)
    beta_fast: float | int | None = number(1e-3, 1000)
    beta_slow: float | int | None = number(1e-3, 1000)
    mscale: float | int | None = number(0, 100)
    mscale_all_dim: float | int | None = number(0, 100)
    truncate: bool | None


@strict
@dataclass
class QuantizationFields:
    """The fields of `quantization_config` in ChatGLM2's own format."""

    quant_method: str
    bits: int = choice(8, 4)
    group_size: int | None = choice(128)
    output_bits: int | None = choice(8)


@strict
@dataclass
class LibraryFields:
    """Fields of a config.json that are no attributes, because transformers converts them."""

    num_labels: int | None = integer(1, 2**20)
    output_attentions: bool | None
    quantization_config: dict | None
    rope_scaling: dict | None
    rope_theta: float | int | None = number(100, 1e10)
    torch_dtype: str | None = dtype_name()


@strict
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

    num_layers: int = integer(1, 1000, default=28)
    padded_vocab_size: int = integer(1, 2**24, default=65024)
    hidden_size: int = integer(1, 2**17, default=4096)
    ffn_hidden_size: int = integer(1, 2**20, default=13696)
    kv_channels: int = checked(
        "a multiple of 4 from 4 to 16384", lambda size: size in range(4, 16385, 4), default=128
    )
    num_attention_heads: int = integer(1, 2**14, default=32)
    seq_length: int = integer(16, MAX_CONTEXT, default=2048)
    hidden_dropout: float | int = number(0, 1, default=0.0)
    classifier_dropout: float | int | None = number(0, 1, default=None)
    attention_dropout: float | int = number(0, 1, default=0.0)
    layernorm_epsilon: float = number(1e-15, 0.01, default=1e-5)
    initializer_range: float | int = number(0, 1, default=0.02)
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = integer(1, 2**14, default=1)
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    quantization_bit: int | None = choice(0, 4, 8, default=0)
    pre_seq_len: int | None = integer(1, 2**20, default=None)
    prefix_projection: bool = False
    original_rope: bool = True
    rope_ratio: float | int = number(0.01, 1000, default=1)
    rope_parameters: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = integer(0, MAX_ID, default=None)
    eos_token_id: int | list[int] | None = id_or_ids(default=2)
    pad_token_id: int | None = integer(0, MAX_ID, default=0)
    auto_map: dict | None = None
    # Fields of transformers, which does not check their types.
    architectures: list[str] | None = None
    dtype: Any = dtype_name(default=None)
    id2label: dict | None = checked(
        "an object from numbers to labels",
        lambda labels: all(str(i).isdigit() for i in labels),
        default=None,
    )
    label2id: dict | None = None
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Create a configuration from the fields of a config.json, after a check of all values.

        Names that would replace a method of the class, and the choice of kernels, are ignored.

        Raises:
            ValueError: A value is not allowed; the message is one line.
        """
        own, converted = (select_fields(kind, config_dict) for kind in (cls, LibraryFields))
        if ignored := find_implementations(config_dict):
            logger.warning(f"config.json: {' and '.join(ignored)} ignored: pass it as an argument.")
        others = {
            name: value
            for name, value in config_dict.items()
            if not ("_implementation" in name or name.startswith("_") or hasattr(cls, name))
        }
        try:
            check_fields(cls, own)
            check_fields(LibraryFields, converted)
            return super().from_dict({**others, **own, **converted}, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error

    def __post_init__(self, **kwargs):
        for alias in self.attribute_map.keys() & kwargs:
            setattr(self, self.attribute_map[alias], kwargs.pop(alias))
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        kwargs["partial_rotary_factor"] = 0.5
        kwargs.pop("num_key_value_heads", None)  # follows from multi_query_attention
        if isinstance(name := self.dtype or kwargs.pop("torch_dtype", None), str):
            self.dtype = name.removeprefix("torch.")
        quantization = dict(kwargs.get("quantization_config") or {})
        if quantization.get("quant_method") == "chatglm":
            if "bits" not in quantization:
                raise ValueError("quantization_config has no bits: give 8 or 4")
            check_fields(QuantizationFields, quantization, "quantization_config: ")
            if unknown := sorted(
                quantization.keys() - select_fields(QuantizationFields, quantization)
            ):
                raise ValueError(f"quantization_config has a field {unknown[0]!r:.80}: remove it")
            self.quantization_bit = quantization["bits"]
        elif self.quantization_bit and not quantization:
            kwargs["quantization_config"] = {"quant_method": "chatglm"}
            kwargs["quantization_config"] |= {"bits": self.quantization_bit, "group_size": None}
        super().__post_init__(**kwargs)

    # The strict dataclass calls each method `validate_*` after it was created.

    def validate_heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}: give a multiple of "
                f"multi_query_group_num, which is {self.num_key_value_heads}"
            )

    def validate_ids(self):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [value]
            if any(i is not None and i >= self.padded_vocab_size for i in ids):
                raise ValueError(
                    f"{name} is {value}: give ids below padded_vocab_size, which is "
                    f"{self.padded_vocab_size}"
                )

    def validate_rope(self):
        rope = self.rope_parameters
        check_fields(RopeFields, rope, "rope_parameters: ")
        if rope["rope_type"] != "default" and rope.get("factor") is None:
            raise ValueError(
                f"rope_parameters has rope_type {rope['rope_type']!r} and no factor: give a number "
                "of at least 1, or rope_type default"
            )
        super().validate_rope()

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads: one for each query head without multi-query attention."""
        if self.multi_query_attention:
            return self.multi_query_group_num
        return self.num_attention_heads

    def to_dict(self) -> dict:
        """Return the fields, and `num_key_value_heads`, which PEFT's prefix tuning reads there."""
        return super().to_dict() | {"num_key_value_heads": self.num_key_value_heads}


ChatGLMConfig.register_for_auto_class()
