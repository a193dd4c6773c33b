"""The layers of a quantized model on a CPU: one C call for each layer, see layer.c.

When PyTorch calls the modules, each kernel waits for Python. So C computes whole layers wherever
the result is the same: `can_compute_layers` checks that at every call.
"""

import ctypes

import torch

from chatglm2.generation_chatglm import ChatGLMCache, ChatGLMCacheLayer, RaggedCache
from chatglm2.modeling_chatglm import (
    MLP,
    ChatGLMModel,
    GLMBlock,
    GLMTransformer,
    RMSNorm,
    SelfAttention,
)
from chatglm2.quantization import QuantizedLinear

from . import cpu_backend
from .build_cpu import Conversation, Layer, get_library

CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in layer.c
MAX_HEAD_DIM = 256
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
ARGUMENTS = {  # of `GLMTransformer.forward`, that C honours; all others must be None or False
    "hidden_states",
    "rotary",
    "kv_cache",
    "cache_dtype",
    "attention_mask",
    "position_ids",
}


def can_compute_layers(transformer: ChatGLMModel, inputs: dict, num_prompt_tokens: int = 0) -> bool:
    """Whether C computes what the modules would; the arguments are those of `Backend.encode`."""
    return (
        are_inputs_plain(inputs, num_prompt_tokens)
        and is_cache_writable(inputs, transformer.config)
        and is_model_plain(transformer)
    )


def are_inputs_plain(inputs: dict, num_prompt_tokens: int) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    states, mask = inputs["hidden_states"], inputs["attention_mask"]
    others = [value for name, value in inputs.items() if name not in ARGUMENTS]
    return (
        not any(value is not None and value is not False for value in others)
        and type(states) is torch.Tensor
        and states.dtype == inputs["rotary"][0].dtype == torch.float32
        and (num_prompt_tokens == 0 or num_prompt_tokens >= states.shape[1])  # one role for all
        and (mask is None or (mask.ndim == 2 and bool(mask.all())))
        and (states.shape[1] == 1 or bool((inputs["position_ids"].diff() == 1).all()))
    )


def is_cache_writable(inputs: dict, config) -> bool:
    """Whether the cache has the type and sizes that C assumes; C checks no bounds."""
    cache, batch_size = inputs["kv_cache"], len(inputs["hidden_states"])
    if type(cache) not in (ChatGLMCache, RaggedCache):
        return False
    rows, is_ragged = list_rows(cache), type(cache) is RaggedCache
    layers = [layer for row in rows for layer in row.layers]
    held = [layer.keys for layer in layers if layer.is_initialized]
    dtypes = {keys.dtype for keys in held}
    if len(held) < len(rows) * config.num_layers:  # `reserve_cache` creates the missing layers
        dtypes.add(None if is_ragged else inputs["cache_dtype"] or torch.float32)
    num_rows = 1 if is_ragged else batch_size  # of each `ChatGLMCache`
    sizes = num_rows, config.num_key_value_heads, config.kv_channels
    return (
        all(type(layer) is ChatGLMCacheLayer for layer in layers)
        and len(dtypes) == 1
        and dtypes <= CACHE_TYPES.keys()
        and num_rows * len(rows) == batch_size
        and all((len(keys), keys.shape[1], keys.shape[3]) == sizes for keys in held)
    )


def list_rows(cache) -> list[ChatGLMCache]:
    return cache.rows if type(cache) is RaggedCache else [cache]


def is_plain(module, kind: type) -> bool:
    """Whether a module is exactly of a class and has no hooks.

    torch has no public way to ask for hooks. accelerate puts its own `forward` into the instance.
    Hooks of all modules (`register_module_forward_hook`) are not seen and not called.
    """
    state = vars(module)
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    return type(module) is kind and not hooks and "forward" not in state


def is_model_plain(transformer: ChatGLMModel) -> bool:
    config = transformer.config
    return (
        config.multi_query_attention
        and config.kv_channels <= MAX_HEAD_DIM
        and config._attn_implementation in ATTENTION_IMPLEMENTATIONS
        and not transformer.training
        and is_plain(transformer.encoder, GLMTransformer)
        and all(map(is_layer_plain, transformer.encoder.layers))
    )


def is_layer_plain(layer: GLMBlock) -> bool:
    if not is_plain(layer, GLMBlock):
        return False
    attention, mlp = layer.self_attention, layer.mlp
    if not (is_plain(attention, SelfAttention) and is_plain(mlp, MLP)):
        return False
    norms = layer.input_layernorm, layer.post_attention_layernorm
    size = layer.config.hidden_size
    return (
        not (layer.training or attention.training)
        and all(is_plain(norm, RMSNorm) and is_readable(norm.weight, size) for norm in norms)
        and all(is_linear_plain(linear) for linear in find_linears(layer))
    )


def is_linear_plain(linear) -> bool:
    return is_plain(linear, QuantizedLinear) and (
        linear.bias is None or is_readable(linear.bias, linear.out_features)
    )


def is_readable(tensor: torch.Tensor, size: int) -> bool:
    """Whether C can read a parameter: plain, contiguous float32."""
    is_plain_float = type(tensor) is torch.nn.Parameter and tensor.dtype == torch.float32
    return is_plain_float and tensor.shape == (size,) and tensor.is_contiguous()


def find_linears(layer: GLMBlock) -> tuple:
    """Return the linear layers in the order of layer.c."""
    attention, mlp = layer.self_attention, layer.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


def describe_layer(layer: GLMBlock, weights: list, rotated_dim: int) -> Layer:
    """Return the C structure of a layer. It does not keep `weights` alive."""
    linears = []
    for linear, packed in zip(find_linears(layer), weights, strict=True):
        described = cpu_backend.describe(linear, packed)
        described.bias = None if linear.bias is None else linear.bias.data_ptr()
        linears.append(described)
    attention, config = layer.self_attention, layer.config
    return Layer(
        *linears,
        layer.input_layernorm.weight.data_ptr(),
        layer.post_attention_layernorm.weight.data_ptr(),
        layer.input_layernorm.eps,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        rotated_dim,
        config.apply_residual_connection_post_layernorm,
    )


def reserve_cache(inputs: dict, attention: SelfAttention) -> tuple[ctypes.Array, torch.dtype]:
    """Make room for the new tokens of each conversation in a layer's cache.

    Returns:
        The C structures of the conversations, and the dtype of the cache.
    """
    hidden_states, index = inputs["hidden_states"], attention.layer_idx
    dtype = inputs["cache_dtype"] or hidden_states.dtype
    conversations = []
    for row in list_rows(inputs["kv_cache"]):
        if index >= len(row.layers) or not row.layers[index].is_initialized:
            shape = len(hidden_states), attention.num_kv_heads, 0, attention.head_dim
            row.update(*2 * [hidden_states.new_empty(shape, dtype=dtype)], index)
        cached = row.layers[index]
        length = cached.reserve(hidden_states.shape[1])
        conversations += [
            Conversation(keys.data_ptr(), values.data_ptr(), length, keys.shape[1])
            for keys, values in zip(*cached.buffers, strict=True)
        ]
    return (Conversation * len(conversations))(*conversations), cached.buffers[0].dtype


@torch.no_grad()
def compute_layers(transformer: ChatGLMModel, inputs: dict, is_exact: bool) -> torch.Tensor:
    """Return the hidden states after the last layer, [b, s, h], and extend the cache."""
    states = inputs["hidden_states"].clone(memory_format=torch.contiguous_format)
    batch, num_new = states.shape[:2]
    cos, sin = (x.expand(batch, -1, -1, -1).contiguous() for x in inputs["rotary"])
    memory = None
    for layer in transformer.encoder.layers:
        conversations, dtype = reserve_cache(inputs, layer.self_attention)
        # Held while C reads them: another thread may save the model, which drops them.
        weights = [linear.pack(cpu_backend.PackedWeight) for linear in find_linears(layer)]
        described = ctypes.byref(describe_layer(layer, weights, 2 * cos.shape[-1]))
        sizes = conversations, num_new, batch * num_new
        if memory is None:  # one piece serves all layers
            memory = cpu_backend.allocate(get_library()[0].chatglm_size_layer(described, *sizes))
        types = CACHE_TYPES[dtype], is_exact
        cpu_backend.call("compute_layer", described, states, cos, sin, *sizes, *types, memory)
        for row in list_rows(inputs["kv_cache"]):  # after the call: an error leaves no garbage
            row.layers[layer.self_attention.layer_idx].extend(num_new)
    return states
