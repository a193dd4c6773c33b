"""The ChatGLM2 network for transformers 5; its cache and chat are in generation_chatglm.py.

Module and parameter names are those of the official checkpoint, so its files load unchanged. This
file is also Hugging Face remote code. Letters in shape comments: b batch, s tokens of this call,
k keys (cached and new tokens), p length of a P-Tuning v2 prefix, h hidden size, H query heads,
G key/value heads, d head size, f inner size of the MLP, L layers, V vocabulary size.
"""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GradientCheckpointingLayer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .configuration_chatglm import ChatGLMConfig
from .generation_chatglm import CACHE_NAME, ChatGLMCache, ChatGLMGenerationMixin, pick_cache
from .quantization import (
    get_quantization,
    is_quantized_so,
    mark_offloaded,
    quantize_model,
    replace_layers,
    resizing_output_layer,
)
from .weights_chatglm import check_weight_file, find_weight_files

logger = logging.get_logger(__name__)

# Before PyTorch 2.7 an export can only be recognized as a compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
MAX_GROUPED_TOKENS = 128  # with more new tokens, expanded keys are as fast as grouped queries


class RotaryEmbedding(nn.Module):
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864), exact in every dtype.

    The frequencies are no buffer and stay float32 when the model is cast. Only the rows of the
    given positions are computed.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.frequencies = None

    def compute_frequencies(self, device, length: int | None = None) -> tuple[torch.Tensor, float]:
        """Return each pair's angle per position, [d / 4], and the factor for cos and sin (yarn)."""
        rope = self.config.rope_parameters
        if rope["rope_type"] == "default":
            dim = self.config.kv_channels // 2
            exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
            frequencies, scaling = 1.0 / rope["rope_theta"] ** exponents, 1.0
        else:
            initialize = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
            frequencies, scaling = initialize(self.config, device, seq_len=length)
        return frequencies / self.config.rope_ratio, scaling

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, [b, 1, s, d / 4] each, in the dtype of `x`, for positions [b, s]."""
        if self.config.rope_parameters["rope_type"] == "dynamic":
            length = max(int(position_ids.max()) + 1, self.config.seq_length)
            frequencies, scaling = self.compute_frequencies(x.device, length)
        else:
            if self.frequencies is None or self.frequencies[0].device != x.device:
                self.frequencies = self.compute_frequencies(x.device)
            frequencies, scaling = self.frequencies
        angles = position_ids[:, None, :, None].float() * frequencies  # [b, 1, s, d / 4]
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the neighbouring pairs in the first half of each head; return the second half as is.

    With x0, x1 = x[..., 2i], x[..., 2i + 1] and the angle a_i of the position:
    y[..., 2i] = x0 cos a_i - x1 sin a_i, y[..., 2i + 1] = x1 cos a_i + x0 sin a_i.

    Shapes: x [b, heads, s, d]; cos and sin [b, 1, s, d / 4].
    """
    rotated_size = 2 * cos.shape[-1]
    x0, x1 = x[..., 0:rotated_size:2], x[..., 1:rotated_size:2]  # [b, heads, s, d / 4]
    pairs = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)  # [..., d / 4, 2]
    return torch.cat((pairs.flatten(-2), x[..., rotated_size:]), dim=-1)  # [b, heads, s, d]


class RMSNorm(nn.Module):
    """RMS normalization (arXiv 1910.07467), computed in float32 and cast to the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide * scale)).to(self.weight.dtype)


def create_norm(config: ChatGLMConfig) -> nn.Module:
    norm = RMSNorm if config.rmsnorm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


def group_queries(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """View the queries that share a key/value head as its rows, so that keys are not expanded.

    [b, H, s, d] -> [b, G, H/G * s, d]; row r * s + i of head g is token i of query head
    g * (H/G) + r.
    """
    batch, num_heads, length, head_dim = query.shape
    return query.reshape(batch, num_kv_heads, num_heads // num_kv_heads * length, head_dim)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs
):
    """Compute attention (arXiv 1706.03762, section 3.2.1) step by step; also return its weights.

    Shapes: query [b, H, s, d]; key and value [b, G, k, d]; attention_mask [b, 1, s, k], added to
    the scores; returns [b, s, H, d] and [b, H, s, k].
    """
    batch, num_heads, length, head_dim = query.shape
    scores = group_queries(query, key.shape[1]) @ key.transpose(-1, -2) * scaling
    scores = scores.view(batch, num_heads, length, -1)  # [b, G, H/G * s, k] -> [b, H, s, k]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = group_queries(weights, key.shape[1]) @ value  # [b, G, H/G * s, d]
    output = output.view(batch, num_heads, length, head_dim).transpose(1, 2)  # [b, s, H, d]
    return output, weights


class SelfAttention(nn.Module):
    """Multi-query attention (arXiv 1911.02150): H query heads share G key/value heads.

    With multi-query attention the rows of `query_key_value` are all queries, then all keys, then
    all values; without it they are query, key and value of each head in turn.
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        query_size = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size,
            query_size + 2 * self.num_kv_heads * self.head_dim,
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.dense = nn.Linear(query_size, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[b, s, (H + 2G) d] -> query [b, H, s, d], key and value [b, G, s, d]."""
        if not self.config.multi_query_attention:
            heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [b, H, s, 3d]
            return heads.chunk(3, dim=-1)
        heads = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, H + 2G, s, d]
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def attend(self, query, key, value, attention_mask, **kwargs):
        """Return the output [b, s, H, d] of all heads and, with eager attention, the weights.

        With `RaggedCache` (s = 1), `key` and `value` are lists of [1, G, k, d], one for each row.
        """
        if isinstance(key, list):
            rows = zip(query.split(1), key, value, strict=True)
            return torch.cat([self.attend(*row, None, **kwargs)[0] for row in rows]), None
        key, value = key.to(query.dtype), value.to(query.dtype)  # unlike `cache_dtype`
        implementation = self.config._attn_implementation
        if implementation == "eager" and is_exporting():  # grouped queries would bound the length
            key, value = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        length = query.shape[2]
        # An exported graph has no branch on the length; "cache" is transformers' paged cache.
        can_group = (
            not is_exporting()
            and "cache" not in kwargs
            and (length == 1 or (attention_mask is not None and length <= MAX_GROUPED_TOKENS))
        )
        if implementation == "sdpa" and self.num_key_value_groups > 1 and can_group:
            if attention_mask is not None and length > 1:
                # [b, 1, s, k] -> [b, 1, H/G * s, k]
                attention_mask = attention_mask.repeat(1, 1, self.num_key_value_groups, 1)
            rows = group_queries(query, self.num_kv_heads)  # [b, G, H/G * s, d]
            output = F.scaled_dot_product_attention(
                rows, key, value, attention_mask, dropout, scale=self.scaling
            )
            return output.reshape(query.shape).transpose(1, 2), None  # [b, s, H, d]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )

    def forward(
        self, x, attention_mask, rotary, kv_cache=None, cache_dtype=None, prefix=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split_heads(self.query_key_value(x))
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if prefix is not None:
            key = torch.cat((prefix[0], key), dim=2)  # [b, G, p + s, d]
            value = torch.cat((prefix[1], value), dim=2)
        if kv_cache is not None:
            stored = key.to(cache_dtype or key.dtype), value.to(cache_dtype or value.dtype)
            key, value = kv_cache.update(*stored, self.layer_idx)
        elif "cache" in kwargs and CACHE_NAME == "cache":
            # Continuous batching of transformers: before 5.24 the attention function updates it.
            key, value = kwargs["cache"].update(key, value, self.layer_idx, kwargs=kwargs)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.dense(output.flatten(2)), weights  # [b, s, H d] -> [b, s, h]


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202); the first half of the output of `dense_h_to_4h` is the gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        size, inner_size, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(size, 2 * inner_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner_size, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)  # [b, s, 2f] -> [b, s, f] each
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(GradientCheckpointingLayer):
    """One layer: norm, attention, residual, norm, MLP, residual."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.input_layernorm = create_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = create_norm(config)
        self.mlp = MLP(config)

    def add(self, hidden_states, normed, output):
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        return residual + F.dropout(output, p=self.config.hidden_dropout, training=self.training)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[b, s, h] -> [b, s, h] and, from eager attention, its weights."""
        normed = self.input_layernorm(hidden_states)
        output, weights = self.self_attention(normed, **kwargs)
        hidden_states = self.add(hidden_states, normed, output)
        normed = self.post_attention_layernorm(hidden_states)
        return self.add(hidden_states, normed, self.mlp(normed)), weights


class GLMTransformer(nn.Module):
    """The layers and the final norm (`encoder` in the checkpoint)."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = create_norm(config)

    def forward(self, hidden_states, prefix, output_hidden_states, output_attentions, **kwargs):
        """Return the final hidden states, those of all layers, and all attention weights.

        The second and the third are `None` unless requested. The states in the second start with
        the embeddings and end before the final norm.
        """
        all_hidden_states = (hidden_states,) if output_hidden_states else None
        all_attentions = () if output_attentions else None
        for i, layer in enumerate(self.layers):
            layer_prefix = None if prefix is None else prefix[i]
            hidden_states, weights = layer(hidden_states, prefix=layer_prefix, **kwargs)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        return self.normalize(hidden_states), all_hidden_states, all_attentions

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "final_layernorm"):
            return hidden_states
        return self.final_layernorm(hidden_states)


class PrefixEncoder(nn.Module):
    """P-Tuning v2 (arXiv 2110.07602): trained keys and values in front of those of each layer."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        size = config.num_layers * 2 * config.num_key_value_heads * config.kv_channels
        self.embedding = nn.Embedding(config.pre_seq_len, size)
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, size)
            )
        self.dropout = nn.Dropout(0.1)

    def forward(self, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return keys and values, [L, 2, b, G, p, d]."""
        config, prefix = self.config, self.embedding.weight  # [p, L 2 G d]
        if config.prefix_projection:
            prefix = self.trans(prefix)
        shape = (config.num_layers, 2, config.num_key_value_heads, config.kv_channels)
        prefix = prefix.to(dtype).unflatten(-1, shape)  # [p, L, 2, G, d]
        prefix = prefix.permute(1, 2, 3, 0, 4).unsqueeze(2)  # [L, 2, 1, G, p, d]
        prefix = prefix.expand(-1, -1, batch_size, -1, -1, -1)  # [L, 2, b, G, p, d]
        return self.dropout(prefix)


class Embedding(nn.Module):
    """The word embeddings, under the checkpoint's name `embedding.word_embeddings`."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


@contextmanager
def creating_parameters(empty_init: bool, device):
    """Within, parameters are created on `device` if it is given, and can be left empty."""
    no_init = no_init_weights() if empty_init else nullcontext()
    with no_init, torch.device(device) if device else nullcontext():
        yield


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Base class of the models: loading, casting and quantizing."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache", "kv_cache"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, device=None, **kwargs):
        """Load a model like `PreTrainedModel.from_pretrained`, after a check of its files.

        Args:
            device: Where to put the whole model, such as "cuda" (an argument of the original).

        Raises:
            OSError: The folder has no config.json, or a weight file is missing or damaged.
            ValueError: The checkpoint is quantized, but not as `quantization_config` requests.
        """
        kwargs["subfolder"] = kwargs.get("subfolder") or ""  # transformers cannot read None
        folder = Path(pretrained_model_name_or_path or "", kwargs["subfolder"])
        if pretrained_model_name_or_path and folder.is_dir():
            if kwargs.get("config") is None and not (folder / "config.json").exists():
                raise OSError(f"{folder} has no config.json: it is no checkpoint folder.")
            others = "variant", "use_safetensors"  # these select other files
            if all(kwargs.get(name) is None for name in others):
                for file in find_weight_files(folder):
                    check_weight_file(file)
        if device is not None and kwargs.get("device_map") is None:
            kwargs["device_map"] = {"": device}
        if kwargs.get("quantization_config") is not None:
            config = kwargs.get("config") or pretrained_model_name_or_path
            if not isinstance(config, PreTrainedConfig):
                others = {k: v for k, v in kwargs.items() if k != "quantization_config"}
                config = cls.config_class.from_pretrained(config, **others)
            if is_quantized_so(config, kwargs["quantization_config"]):
                del kwargs["quantization_config"]  # transformers would warn
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.freeze_for_prefix()  # the loader makes every parameter trainable
        mark_offloaded(model)
        return loaded

    def get_output_embeddings(self):
        return self.base_model.output_layer

    def set_output_embeddings(self, value):
        self.base_model.output_layer = value

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize like `PreTrainedModel`, also if the model is quantized."""
        with resizing_output_layer(self.base_model):
            embedding = super().resize_token_embeddings(*args, **kwargs)
        self.tie_weights()  # does nothing unless the config requests it
        return embedding

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states; a quantized model may store its embedding in another."""
        return getattr(self.get_input_embeddings(), "compute_dtype", None) or super().dtype

    # PreTrainedModel refuses these for every quantized model; this quantization allows any dtype.

    def float(self):
        return self.to(torch.float32)

    def half(self):
        return self.to(torch.float16)

    def quantize(self, bits: int, group_size: int | None = None, output_bits: int | None = None):
        """Quantize the weights of all layers to INT8 or INT4 in place; return the model.

        The embedding and the output layer are then stored in 16 bits. Weights, scales and packing
        are the official ones unless `group_size` is given.

        Args:
            bits: 8, 4, or 0 to change nothing. A model that has these bits already is not changed.
            group_size: 128, with 4 bits: one scale for each 128 columns of a row, which is more
                accurate than one scale for each row.
            output_bits: 8: quantize the output layer too, also in a model quantized before.

        Raises:
            ValueError: Another value is given, or the model is quantized in another way.
        """
        return quantize_model(self, bits, group_size, output_bits)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers, final norm, and the output layer, which the checkpoint stores here.

    Args:
        empty_init: Leave the weights uninitialized, for a caller that loads them. By default they
            are drawn at random; `from_pretrained` needs no argument.
        device: Where to create the weights.

    Attributes:
        cache_dtype: The dtype of cached keys and values; `None` for the dtype they have.
        backend: The `ModelBackend` of the quantized layers; `None` if there are none.
    """

    cache_dtype: torch.dtype | None = None
    backend = None

    def __init__(self, config: ChatGLMConfig, empty_init=False, device=None):
        super().__init__(config)
        with creating_parameters(empty_init, device):
            self.embedding = Embedding(config)
            self.rotary_pos_emb = RotaryEmbedding(config)
            self.encoder = GLMTransformer(config)
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
            if config.pre_seq_len is not None:
                self.prefix_encoder = PrefixEncoder(config)
            self.post_init()
            if config.quantization_bit:
                is_empty = empty_init or self.output_layer.weight.is_meta
                replace_layers(self, get_quantization(config), is_empty)
        self.freeze_for_prefix()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value):
        self.embedding.word_embeddings = value

    def freeze_for_prefix(self):
        """Train only the P-Tuning v2 prefix of a model that has one, as the original."""
        if self.config.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def is_checkpointing(self) -> bool:
        """True if the backward pass computes layers again, which would write to a cache twice."""
        return torch.is_grad_enabled() and any(
            layer.training and layer.gradient_checkpointing for layer in self.encoder.layers
        )

    def choose_cache(
        self, cache: Cache | None, use_cache: bool | None
    ) -> tuple[Cache | None, bool]:
        """Return the cache to read and extend, and whether the outputs contain it."""
        if self.is_checkpointing():
            if cache is not None:
                logger.warning_once("The cache is ignored: gradient checkpointing is enabled.")
            return None, False
        if use_cache is None:
            use_cache = self.config.use_cache
        return (ChatGLMCache() if use_cache and cache is None else cache), use_cache

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the embeddings [b, s, h] that were given, or those of the ids [b, s]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self.embedding.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds

    def begin_with_prefix(self, inputs_embeds: torch.Tensor, cache: Cache | None):
        """Return the P-Tuning v2 prefix of all layers, and a cache of it for `create_mask`."""
        prefix = self.prefix_encoder(len(inputs_embeds), inputs_embeds.dtype)
        mask_cache = DynamicCache()
        mask_cache.update(*prefix[0], layer_idx=0)
        if isinstance(cache, ChatGLMCache):
            cache.prefix_length = self.config.pre_seq_len
        return prefix, mask_cache

    def create_mask(self, inputs_embeds, attention_mask, cache, position_ids):
        """Return the mask in the form that the attention implementation takes, or `None`."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        has_past = cache is not None and cache.get_query_offset(0) > 0
        is_padded = attention_mask is not None and attention_mask.ndim == 2
        if not is_padded or has_past or mask is None or mask.ndim != 4:
            return mask
        # As the original: a padding token attends to every token, so no row is fully masked.
        is_padding = attention_mask[:, None, :, None] == 0
        return mask | is_padding if mask.dtype == torch.bool else mask * ~is_padding

    def encode(self, inputs_embeds, attention_mask, position_ids, cache, /, **kwargs):
        """Compute all layers; return the result of `GLMTransformer.forward`."""
        device = inputs_embeds.device  # a model can be on several
        offset = 0 if cache is None else cache.get_query_offset(0)
        prefix, mask_cache, prefix_length = None, cache, self.config.pre_seq_len
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        if prefix_length is not None:
            if "cache" in kwargs or (cache is not None and cache.is_compileable):
                raise ValueError(
                    "a P-Tuning v2 prefix cannot be put into a static or paged cache: use a "
                    "ChatGLMCache, without cache_implementation='static' or continuous batching"
                )
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (prefix_length, 0), value=1)  # [b, p + k]
            if offset == 0:
                prefix, mask_cache = self.begin_with_prefix(inputs_embeds, cache)
            else:
                offset -= prefix_length  # the first token after the prefix has position 0
        if position_ids is None:
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(offset, offset + length, device=device)[None]  # [1, s]
        position_ids = position_ids.to(device)
        is_wide = self.config.fp32_residual_connection
        inputs = {
            "hidden_states": inputs_embeds.float() if is_wide else inputs_embeds,
            "rotary": self.rotary_pos_emb(inputs_embeds, position_ids),
            "kv_cache": cache,
            "cache_dtype": self.cache_dtype,
            "prefix": prefix,
            **kwargs,
        }
        return self.call_layers(inputs, attention_mask, position_ids, mask_cache)

    def call_layers(self, inputs: dict, attention_mask, position_ids, mask_cache):
        """Call the encoder, or the backend of the quantized layers if it computes whole layers."""
        if self.backend is not None:
            tokens = {"attention_mask": attention_mask, "position_ids": position_ids}
            hidden_states = self.backend.encode(self, {**inputs, **tokens})
            if hidden_states is not None:
                return self.encoder.normalize(hidden_states), None, None
        states = inputs["hidden_states"]
        mask = self.create_mask(states, attention_mask, mask_cache, position_ids)
        return self.encoder(attention_mask=mask, **inputs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states [b, s, h].

        Args:
            attention_mask: [b, k], 0 for padding, or [b, 1, s, k].
            cache: The name of `past_key_values` since transformers 5.24.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        cache = pick_cache(past_key_values, cache)
        if cache is not None and not isinstance(cache, Cache):
            # Continuous batching of transformers: the attention layers update its paged cache.
            cache, kwargs["cache"] = None, cache
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name)
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        cache, use_cache = self.choose_cache(cache, use_cache)
        hidden_states, all_hidden_states, attentions = self.encode(
            inputs_embeds, attention_mask, position_ids, cache, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states,
            attentions=attentions,
            **{CACHE_NAME: cache if use_cache else None},
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
    """The language model, with `generate`, `chat` and `stream_chat`; arguments: `ChatGLMModel`."""

    _tied_weights_keys = {
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLMConfig, empty_init=False, device=None):
        super().__init__(config)
        with creating_parameters(empty_init, device):
            self.transformer = ChatGLMModel(config, empty_init)
            self.post_init()
        self.tie_weights()  # does nothing unless the config requests it

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        *,
        return_last_logit: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits [b, s, V] and, with `labels` [b, s] (-100: ignored), the mean loss.

        Args:
            logits_to_keep: Compute only the last n positions, or the positions in an index tensor;
                0 for all.
            return_last_logit: The original's name for `logits_to_keep=1`.
            cache: The name of `past_key_values` since transformers 5.24.
        """
        outputs = self.transformer(
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if return_last_logit:
            logits_to_keep = 1
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.padded_vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """A classifier with a linear head on the last position, so inputs are padded on the left."""

    def __init__(self, config: ChatGLMConfig, empty_init=False, device=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        with creating_parameters(empty_init, device):
            self.transformer = ChatGLMModel(config, empty_init)
            self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
            self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
            self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Compute logits [b, num_labels] and, with `labels` [b] (or [b, num_labels]), the loss.

        The other arguments are those of `ChatGLMModel.forward`.
        """
        outputs = self.transformer(
            input_ids,
            position_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier_head(self.dropout(outputs.last_hidden_state[:, -1]))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits.float(), self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


ChatGLMForConditionalGeneration.register_for_auto_class("AutoModel")
ChatGLMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
