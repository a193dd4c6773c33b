"""A whole decode step of a quantized model on a CPU: one C call for each layer, see decode.c.

Called one by one from PyTorch, the kernels wait for Python between the products. The step is taken
only where it computes what the modules would: `fused_step_supported` asks that at every call.
"""

import ctypes

import torch

from chatglm2.modeling_chatglm import (
    MLP,
    ChatGLMCache,
    ChatGLMCacheLayer,
    ChatGLMModel,
    GLMBlock,
    GLMTransformer,
    RaggedCache,
    RMSNorm,
    SelfAttention,
)
from chatglm2.quantization import QuantizedLinear

from . import cpu_backend
from .build_cpu import Conversation, Layer, get_library

CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in decode.c
MAX_HEAD_DIM = 256
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


def fused_step_supported(transformer: ChatGLMModel, inputs: dict) -> str | None:
    """Return why the modules must be called one by one, or None.

    Args:
        inputs: The arguments of `GLMTransformer.forward`.
    """
    return find_problem_of_call(inputs) or find_problem_of_model(transformer)


def find_problem_of_call(inputs: dict) -> str | None:
    inputs = dict(inputs)
    hidden_states, cache = inputs.pop("hidden_states"), inputs.pop("past_key_values")
    inputs.pop("rotary")
    asked = [name for name, value in inputs.items() if value is not None and value is not False]
    if asked:
        return f"{asked[0]} is given"
    if type(hidden_states) is not torch.Tensor or hidden_states.dtype != torch.float32:
        return "the hidden states are not plain float32"
    if hidden_states.shape[1] != 1:
        return "there is more than one new token"
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        return "a gradient is needed"
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return "autocast or torch.compile changes what is computed"
    return find_problem_of_cache(cache)


def find_problem_of_cache(cache) -> str | None:
    if type(cache) not in (ChatGLMCache, RaggedCache):
        return f"the cache is a {type(cache).__name__}"
    for row in cache.rows if type(cache) is RaggedCache else [cache]:
        for layer in row.layers:
            if type(layer) is not ChatGLMCacheLayer or not layer.is_initialized:
                return "the cache is empty, or its layers are of another type"
        if not row.layers or row.layers[0].keys.dtype not in CACHE_TYPES:
            return "the cache is empty, or of another dtype"
    return None


def is_plain(module, kind: type) -> bool:
    """Whether a module is of exactly a class, and nothing is hooked into it.

    torch has no public way to ask for hooks; accelerate puts its own `forward` into the instance.
    """
    state = vars(module)
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    return type(module) is kind and not hooks and "forward" not in state


def find_problem_of_model(transformer: ChatGLMModel) -> str | None:
    config, encoder = transformer.config, transformer.encoder
    if not config.multi_query_attention or config.kv_channels > MAX_HEAD_DIM:
        return "the attention heads are laid out otherwise, or too large"
    if transformer.training:
        return "the model is in training mode"
    if config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        return f"the attention is {config._attn_implementation}"
    if not is_plain(encoder, GLMTransformer):
        return "the encoder is changed or hooked"
    for i, block in enumerate(encoder.layers):
        if not is_plain(block, GLMBlock):
            return f"block {i} is a {type(block).__name__} or hooked"
        attention, mlp = block.self_attention, block.mlp
        if not (is_plain(attention, SelfAttention) and is_plain(mlp, MLP)):
            return f"attention or MLP of block {i} is changed or hooked"
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            if not is_plain(norm, RMSNorm) or norm.weight.dtype != torch.float32:
                return f"a norm of block {i} is a {type(norm).__name__}, not float32, or hooked"
        for linear in find_linears(block):
            if not is_plain(linear, QuantizedLinear):
                return f"a layer of block {i} is a {type(linear).__name__} or hooked"
            if linear.bias is not None and linear.bias.dtype != torch.float32:
                return f"a bias of block {i} is not float32"
    return None


def find_linears(block: GLMBlock) -> tuple:
    """Return the layers in the order of decode.c."""
    attention, mlp = block.self_attention, block.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


def describe_layer(block: GLMBlock) -> Layer:
    """Return a block as C sees it, with the addresses of its weights."""
    linears = []
    for linear in find_linears(block):
        described = cpu_backend.describe(linear, cpu_backend.prepare(linear))
        described.bias = None if linear.bias is None else linear.bias.data_ptr()
        linears.append(described)
    attention, config = block.self_attention, block.config
    return Layer(
        *linears,
        block.input_layernorm.weight.data_ptr(),
        block.post_attention_layernorm.weight.data_ptr(),
        block.input_layernorm.eps,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        attention.head_dim // 2,
        config.apply_residual_connection_post_layernorm,
    )


def describe_rows(cache, layer_idx: int) -> tuple[ctypes.Array, torch.dtype]:
    """Make room for a token in each conversation, and return where its keys and values go."""
    rows = []
    for row in cache.rows if type(cache) is RaggedCache else [cache]:
        layer = row.layers[layer_idx]
        length = layer.extend(1)
        keys, values = layer.buffers
        batch, num_heads, capacity, head_dim = keys.shape
        size = num_heads * capacity * head_dim * keys.element_size()
        rows += [
            Conversation(keys.data_ptr() + i * size, values.data_ptr() + i * size, length, capacity)
            for i in range(batch)
        ]
    return (Conversation * len(rows))(*rows), keys.dtype


@torch.no_grad()
def run_fused_step(transformer: ChatGLMModel, inputs: dict) -> torch.Tensor:
    """Return the hidden states after the last block, [b, 1, h]; the cache has a token more."""
    hidden_states, cache = inputs["hidden_states"].clone().contiguous(), inputs["past_key_values"]
    batch = len(hidden_states)
    cos, sin = (x.expand(batch, -1, -1, -1).contiguous() for x in inputs["rotary"])
    for block in transformer.encoder.layers:
        rows, dtype = describe_rows(cache, block.self_attention.layer_idx)
        layer = ctypes.byref(describe_layer(block))
        states = hidden_states, cos, sin
        cpu_backend.call("decode_layer", layer, *states, rows, batch, CACHE_TYPES[dtype])
    return hidden_states
