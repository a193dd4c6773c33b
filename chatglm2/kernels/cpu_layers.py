"""The blocks of a quantized model on a CPU: one C call for each, see layer.c.

Called one by one from PyTorch, the kernels wait for Python between the products. So this is done
wherever it computes what the modules would: `fused_step_supported` asks that at every call.
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
ARGUMENTS = (  # that are looked at
    "hidden_states",
    "rotary",
    "kv_cache",
    "cache_dtype",
    "attention_mask",
    "position_ids",
)


def fused_step_supported(
    transformer: ChatGLMModel, inputs: dict, num_prompt_tokens: int = 0
) -> str | None:
    """Return why the modules must be called one by one, or None.

    Args:
        inputs: The arguments of `GLMTransformer.forward`, but with the model's `attention_mask` and
            `position_ids`.
        num_prompt_tokens: So many of the tokens are a prompt's.
    """
    return (
        find_problem_of_tokens(inputs, num_prompt_tokens)
        or find_problem_of_cache(inputs, transformer.config)
        or find_problem_of_model(transformer)
    )


def find_problem_of_tokens(inputs: dict, num_prompt_tokens: int) -> str | None:
    others = [name for name in inputs if name not in ARGUMENTS]
    for name in (*others, "prefix", "output_hidden_states", "output_attentions"):
        if inputs[name] is not None and inputs[name] is not False:
            return f"{name} is given"
    hidden_states, mask = inputs["hidden_states"], inputs["attention_mask"]
    if type(hidden_states) is not torch.Tensor or hidden_states.dtype != torch.float32:
        return "the hidden states are not plain float32"
    if inputs["rotary"][0].dtype != torch.float32:
        return "the rotary embedding is not float32"
    if num_prompt_tokens and num_prompt_tokens < hidden_states.shape[1]:
        return "not all tokens have one role"
    if mask is not None and (mask.ndim != 2 or not mask.all()):
        return "tokens are masked"
    positions = inputs["position_ids"]
    if hidden_states.shape[1] > 1 and not (positions.diff() == 1).all():
        return "the positions are not consecutive"
    if torch.is_grad_enabled():
        return "a gradient may be needed"
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return "autocast or torch.compile changes what is computed"
    return None


def find_problem_of_cache(inputs: dict, config) -> str | None:
    """Return why C cannot write into a cache; it checks no bounds."""
    cache, batch_size = inputs["kv_cache"], len(inputs["hidden_states"])
    if type(cache) not in (ChatGLMCache, RaggedCache):
        return f"the cache is a {type(cache).__name__}"
    rows = list_rows(cache)
    layers = [layer for row in rows for layer in row.layers]
    for layer in layers:
        if type(layer) is not ChatGLMCacheLayer:
            return f"a layer of the cache is a {type(layer).__name__}"
    held = [layer.keys for layer in layers if layer.is_initialized]
    dtypes = {keys.dtype for keys in held}
    if len(held) < len(rows) * config.num_layers:  # others are made
        if type(cache) is RaggedCache:
            return "a row of the cache is empty"
        dtypes.add(inputs["cache_dtype"] or torch.float32)
    if len(dtypes) > 1 or not dtypes <= CACHE_TYPES.keys():
        return f"the cache has {', '.join(map(str, dtypes))}"
    num_rows = 1 if type(cache) is RaggedCache else batch_size
    sizes = num_rows, config.num_key_value_heads, config.kv_channels
    if num_rows * len(rows) != batch_size or any(
        (len(keys), keys.shape[1], keys.shape[3]) != sizes for keys in held
    ):
        return "the cache has other sizes"
    return None


def list_rows(cache) -> list[ChatGLMCache]:
    return cache.rows if type(cache) is RaggedCache else [cache]


def is_plain(module, kind: type) -> bool:
    """Whether a module is of exactly a class, and nothing is hooked into it.

    torch has no public way to ask for hooks; accelerate puts its own `forward` into the instance.
    Hooks of all modules (`register_module_forward_hook`) are not seen, and not called.
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
        return f"the encoder is a {type(encoder).__name__} or hooked"
    problems = (find_problem_of_block(block) for block in encoder.layers)
    return next(filter(None, problems), None)


def is_readable(tensor: torch.Tensor, size: int) -> bool:
    """Whether C can read a parameter: plain float32, one number after the other."""
    is_plain_float = type(tensor) is torch.nn.Parameter and tensor.dtype == torch.float32
    return is_plain_float and tensor.shape == (size,) and tensor.is_contiguous()


def find_problem_of_block(block: GLMBlock) -> str | None:
    if not is_plain(block, GLMBlock):
        return f"a block is a {type(block).__name__} or hooked"
    if not (is_plain(block.self_attention, SelfAttention) and is_plain(block.mlp, MLP)):
        return "an attention or MLP is of another class or hooked"
    if block.training or block.self_attention.training:
        return "a block is in training mode"
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        if not is_plain(norm, RMSNorm):
            return f"a norm is a {type(norm).__name__} or hooked"
        if not is_readable(norm.weight, block.config.hidden_size):
            return "a norm is not plain float32"
    for linear in find_linears(block):
        if not is_plain(linear, QuantizedLinear):
            return f"a layer is a {type(linear).__name__} or hooked"
        if (bias := linear.bias) is not None and not is_readable(bias, linear.out_features):
            return "a bias is not plain float32"
    return None


def find_linears(block: GLMBlock) -> tuple:
    """Return the layers in the order of layer.c."""
    attention, mlp = block.self_attention, block.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


def describe_layer(block: GLMBlock, weights: list, rotated_dim: int) -> Layer:
    """Return a block as C sees it, with the addresses of its weights, which it does not keep."""
    linears = []
    for linear, packed in zip(find_linears(block), weights, strict=True):
        described = cpu_backend.describe(linear, packed)
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
        rotated_dim,
        config.apply_residual_connection_post_layernorm,
    )


def reserve_cache(cache, block: GLMBlock, inputs: dict) -> tuple[ctypes.Array, torch.dtype]:
    """Make room for the new tokens of each conversation, and return where they go."""
    attention, hidden_states = block.self_attention, inputs["hidden_states"]
    dtype = inputs["cache_dtype"] or hidden_states.dtype
    conversations = []
    for row in list_rows(cache):
        layers = row.layers[attention.layer_idx :]
        if not (layers and layers[0].is_initialized):  # nothing is cached yet, or after a reset
            shape = len(hidden_states), attention.num_kv_heads, 0, attention.head_dim
            row.update(*2 * [hidden_states.new_empty(shape, dtype=dtype)], attention.layer_idx)
        layer = row.layers[attention.layer_idx]
        length = layer.reserve(hidden_states.shape[1])
        keys, values = layer.buffers
        size = keys[0].nbytes
        conversations += [
            Conversation(
                keys.data_ptr() + i * size, values.data_ptr() + i * size, length, keys.shape[2]
            )
            for i in range(len(keys))
        ]
    return (Conversation * len(conversations))(*conversations), keys.dtype


@torch.no_grad()
def run_fused_step(transformer: ChatGLMModel, inputs: dict, is_exact: bool) -> torch.Tensor:
    """Return the hidden states after the last block, [b, s, h]; the cache then has the tokens."""
    states = inputs["hidden_states"].clone(memory_format=torch.contiguous_format)
    batch, num_new = states.shape[:2]
    cos, sin = (x.expand(batch, -1, -1, -1).contiguous() for x in inputs["rotary"])
    memory = None
    for block in transformer.encoder.layers:
        conversations, dtype = reserve_cache(inputs["kv_cache"], block, inputs)
        # held here while C reads them: another thread may save the model, which restores them
        weights = [cpu_backend.prepare(linear) for linear in find_linears(block)]
        layer = ctypes.byref(describe_layer(block, weights, 2 * cos.shape[-1]))
        sizes = conversations, num_new, batch * num_new
        if memory is None:  # for all layers
            memory = cpu_backend.allocate(get_library()[0].chatglm_size_layer(layer, *sizes))
        types = CACHE_TYPES[dtype], is_exact
        cpu_backend.call("compute_layer", layer, states, cos, sin, *sizes, *types, memory)
        for row in list_rows(inputs["kv_cache"]):  # only now: an error leaves no garbage
            row.layers[block.self_attention.layer_idx].extend(num_new)
    return states
