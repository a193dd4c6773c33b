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

CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in layer.h
MAX_HEAD_DIM = 256  # as in attention.c
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
ARGUMENTS = {  # of `GLMTransformer.forward`, that C honours; all others must be None or False
    "hidden_states",
    "rotary",
    "kv_cache",
    "cache_dtype",
    "attention_mask",
    "position_ids",
}


def can_compute_layers(transformer: ChatGLMModel, inputs: dict) -> bool:
    """Whether C computes what the modules would; the arguments are those of `Backend.encode`."""
    return (
        are_inputs_plain(inputs)
        and are_inputs_readable(inputs, transformer.config)
        and is_cache_writable(inputs, transformer.config)
        and is_model_plain(transformer)
    )


def are_inputs_plain(inputs: dict) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    states, mask = inputs["hidden_states"], inputs["attention_mask"]
    others = [value for name, value in inputs.items() if name not in ARGUMENTS]
    return (
        not any(value is not None and value is not False for value in others)
        and type(states) is torch.Tensor
        and states.dtype == inputs["rotary"][0].dtype == torch.float32
        and (mask is None or (mask.ndim == 2 and bool(mask.all())))
        and (states.shape[1] == 1 or bool((inputs["position_ids"].diff() == 1).all()))
    )


def are_inputs_readable(inputs: dict, config) -> bool:
    """Whether the inputs have the sizes that C assumes; the modules broadcast a short rotary."""
    _, length, size = inputs["hidden_states"].shape
    _, _, positions, pairs = inputs["rotary"][0].shape
    return size == config.hidden_size and positions == length and 2 * pairs <= config.kv_channels


def is_cache_writable(inputs: dict, config) -> bool:
    """Whether the cache has the type and sizes that C assumes; C checks no bounds.

    All layers of a conversation must hold the same number of tokens, and no two conversations may
    share a layer.
    """
    cache, batch_size = inputs["kv_cache"], len(inputs["hidden_states"])
    if type(cache) not in (ChatGLMCache, RaggedCache):
        return False
    rows, is_ragged = list_rows(cache), type(cache) is RaggedCache
    layers = [layer for row in rows for layer in row.layers]
    held = [x for layer in layers if layer.is_initialized for x in (layer.keys, layer.values)]
    dtypes = {x.dtype for x in held}
    if len(held) < 2 * len(rows) * config.num_layers:  # `reserve_cache` creates the missing layers
        dtypes.add(None if is_ragged else inputs["cache_dtype"] or torch.float32)
    num_rows = 1 if is_ragged else batch_size  # of each `ChatGLMCache`
    sizes = num_rows, config.num_key_value_heads, config.kv_channels
    return (
        all(type(layer) is ChatGLMCacheLayer for layer in layers)
        and len(set(map(id, layers))) == len(layers)
        and len(dtypes) == 1
        and dtypes <= CACHE_TYPES.keys()
        and num_rows * len(rows) == batch_size
        and all((len(x), x.shape[1], x.shape[3]) == sizes for x in held)
        and all(x.device.type == "cpu" for x in held)
        and all(has_one_length(row, config.num_layers) for row in rows)
    )


def has_one_length(cache: ChatGLMCache, num_layers: int) -> bool:
    """Whether all layers of a conversation hold as many keys, and values, as the first."""
    held = [x for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values)]
    lengths = {x.shape[2] for x in held}
    return len(lengths | {0} if len(held) < 2 * num_layers else lengths) == 1


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
        and config.num_attention_heads % config.num_key_value_heads == 0
        and config.kv_channels <= MAX_HEAD_DIM
        and config._attn_implementation in ATTENTION_IMPLEMENTATIONS
        and not transformer.training
        and is_plain(transformer.encoder, GLMTransformer)
        and all(is_layer_plain(layer, config) for layer in transformer.encoder.layers)
    )


def is_layer_plain(layer: GLMBlock, config) -> bool:
    if not is_plain(layer, GLMBlock):
        return False
    attention, mlp = layer.self_attention, layer.mlp
    if not (is_plain(attention, SelfAttention) and is_plain(mlp, MLP)):
        return False
    norms = layer.input_layernorm, layer.post_attention_layernorm
    size = config.hidden_size
    return (
        not (layer.training or attention.training)
        and all(is_plain(norm, RMSNorm) and is_readable(norm.weight, size) for norm in norms)
        and all(is_linear_plain(linear) for linear in find_linears(layer))
        and are_sizes_plain(layer, config)
    )


def is_linear_plain(linear) -> bool:
    return (
        is_plain(linear, QuantizedLinear)
        and linear.group_size in cpu_backend.GROUP_SIZES
        and (linear.bias is None or is_readable(linear.bias, linear.out_features))
    )


def is_readable(tensor: torch.Tensor, size: int) -> bool:
    is_parameter = type(tensor) is torch.nn.Parameter
    return is_parameter and cpu_backend.is_readable(tensor, torch.float32, size)


def are_sizes_plain(layer: GLMBlock, config) -> bool:
    """Whether attention and linear layers have the sizes that the config and the cache have."""
    attention, size = layer.self_attention, config.hidden_size
    sizes = attention.num_heads, attention.num_kv_heads, attention.head_dim
    num_heads, num_kv_heads, head_dim = sizes
    qkv, dense, h_to_4h, h4_to_h = ((x.in_features, x.out_features) for x in find_linears(layer))
    return (
        sizes == (config.num_attention_heads, config.num_key_value_heads, config.kv_channels)
        and qkv == (size, (num_heads + 2 * num_kv_heads) * head_dim)
        and dense == (num_heads * head_dim, size)
        and h_to_4h == (size, 2 * h4_to_h[0])
        and h4_to_h[1] == size
    )


def find_linears(layer: GLMBlock) -> tuple:
    """Return the linear layers in the order of layer.h."""
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
    num_kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    dtype = inputs["cache_dtype"] or hidden_states.dtype
    conversations = []
    for row in list_rows(inputs["kv_cache"]):
        if index >= len(row.layers) or not row.layers[index].is_initialized:
            shape = len(hidden_states), num_kv_heads, 0, head_dim
            row.update(*2 * [hidden_states.new_empty(shape, dtype=dtype)], index)
        cached = row.layers[index]
        length = cached.reserve(hidden_states.shape[1])
        capacity, cache_dtype = cached.buffers[0].shape[2], cached.keys.dtype
        for buffers in zip(*cached.buffers, strict=True):
            shape = num_kv_heads, capacity, head_dim
            addresses = (cpu_backend.get_address(x, cache_dtype, *shape) for x in buffers)
            conversations.append(Conversation(*addresses, length, capacity))
    if len(conversations) != len(hidden_states):
        raise RuntimeError("the buffers of the cache are not those of its keys and values")
    return (Conversation * len(conversations))(*conversations), cache_dtype


@torch.no_grad()
def compute_layers(transformer: ChatGLMModel, inputs: dict) -> torch.Tensor:
    """Return the hidden states after the last layer, [b, s, h], and extend the cache."""
    states = inputs["hidden_states"].clone(memory_format=torch.contiguous_format)
    batch, num_new = states.shape[:2]
    cos, sin = (x.expand(batch, -1, -1, -1).contiguous() for x in inputs["rotary"])
    rotary_shape = batch, 1, num_new, cos.shape[3]
    addresses = (
        cpu_backend.get_address(states, torch.float32, *states.shape),
        *(cpu_backend.get_address(x, torch.float32, *rotary_shape) for x in (cos, sin)),
    )
    memory = None
    for layer in transformer.encoder.layers:
        conversations, dtype = reserve_cache(inputs, layer.self_attention)
        # Held while C reads them: another thread may save the model, which drops them.
        weights = [linear.pack(cpu_backend.PackedWeight) for linear in find_linears(layer)]
        described = ctypes.byref(describe_layer(layer, weights, 2 * cos.shape[-1]))
        sizes = conversations, num_new, batch * num_new
        num_bytes = get_library()[0].chatglm_size_layer(described, *sizes)
        if memory is None or len(memory) < num_bytes:  # seldom more than once
            memory = cpu_backend.allocate(num_bytes)
        types = CACHE_TYPES[dtype], memory.data_ptr()
        cpu_backend.call("compute_layer", described, *addresses, *sizes, *types)
        for row in list_rows(inputs["kv_cache"]):  # after the call: an error leaves no garbage
            row.layers[layer.self_attention.layer_idx].extend(num_new)
    return states
