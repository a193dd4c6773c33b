"""The layers in C against the modules, and when the modules are called instead."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from memory import create_sparse
from test_modeling_chatglm import VARIANT_NAMES, VARIANTS, create_variant
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from chatglm2 import ChatGLMCache, ChatGLMConfig, ChatGLMForConditionalGeneration, modeling_chatglm
from chatglm2.generation_chatglm import ChatGLMCacheLayer, RaggedCache
from chatglm2.kernels import build_cpu, cpu_backend, cpu_layers
from chatglm2.modeling_chatglm import eager_attention_forward
from chatglm2.quantization import QuantizedLinear

pytestmark = pytest.mark.usefixtures("need_library")
DTYPES = [torch.float16, torch.bfloat16]
IDS = torch.tensor([[7]])
FIELDS = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16,
    "num_attention_heads": 4, "multi_query_group_num": 2, "padded_vocab_size": 96,
    "seq_length": 2048, "multi_query_attention": True,
    "add_qkv_bias": True,
}  # fmt: skip
load = ChatGLMForConditionalGeneration.from_pretrained


def create(bits=4, group_size=None, **fields):
    """Build a quantized model of random weights, none of them 0 or 1 throughout."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**FIELDS, **fields})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
        else:
            nn.init.normal_(parameter.data, std=parameter.shape[1] ** -0.5)
    return model.quantize(bits, group_size)


@pytest.fixture(scope="module")
def bundled(tiny_checkpoint):
    return load(tiny_checkpoint, dtype=torch.float32).eval().quantize(4)


@pytest.fixture
def taken(monkeypatch):
    """A list that says for each forward whether C computed its layers."""
    found = []

    def record(*args):
        found.append(can_compute(*args))
        return found[-1]

    can_compute = cpu_layers.can_compute_layers
    monkeypatch.setattr(cpu_layers, "can_compute_layers", record)
    return found


@contextmanager
def calling_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layers, "can_compute_layers", lambda *args: False)
        yield


def fill(model, length=5, batch=1, seed=0, dtype=torch.float32) -> ChatGLMCache:
    """Return a cache of random keys and values."""
    cache, generator = ChatGLMCache(), torch.Generator().manual_seed(seed)
    config = model.config
    shape = batch, config.num_key_value_heads, length, config.kv_channels
    for i in range(config.num_layers):
        cache.update(*torch.randn(2, *shape, generator=generator).to(dtype), i)
    return cache


@torch.no_grad()
def take_steps(model, cache, batch=1, count=3, first=0) -> torch.Tensor:
    """Feed `count` tokens one by one; return their logits [b, count, V]."""
    logits, rows = [], torch.arange(first, first + batch)[:, None]
    for step in range(count):
        ids = (rows * 7 + step * 3 + 5) % model.config.padded_vocab_size
        positions = None
        if isinstance(cache, RaggedCache):
            positions = torch.tensor([[row.get_seq_length()] for row in cache.rows])
        logits.append(model(ids, positions, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def compute(model, ids, cache) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


def draw_ids(model, length, batch=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.padded_vocab_size, (batch, length), generator=generator)


def assert_close(actual, expected, dtype=torch.float32):
    """Up to a part of the greatest number; a close number may be rounded otherwise.

    Activations are rounded to 16 bits, and keys and values to the dtype of the cache.
    """
    tolerance = 2e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=atol)


def assert_same_cache(actual, expected):
    rows, others = cpu_layers.list_rows(actual), cpu_layers.list_rows(expected)
    for row, other_row in zip(rows, others, strict=True):
        for layer, other in zip(row.layers, other_row.layers, strict=True):
            assert layer.keys.dtype == other.keys.dtype
            assert_close(layer.keys, other.keys, layer.keys.dtype)
            assert_close(layer.values, other.values, layer.keys.dtype)


def compare(taken, run, make_cache):
    """Check that C computes `run(cache)`, and that the modules give the same."""
    taken.clear()
    logits = run(cache := make_cache())
    assert taken and all(taken)
    with calling_modules():
        expected = run(expected_cache := make_cache())
    assert_close(logits, expected, cache.layers[0].keys.dtype)
    assert_same_cache(cache, expected_cache)


def check_steps(model, taken, length=9, batch=1, dtype=torch.float32):
    run = partial(take_steps, model, batch=batch)
    compare(taken, run, lambda: fill(model, length, batch, dtype=dtype))


def check_prompt(model, taken, ids, make_cache=ChatGLMCache):
    compare(taken, partial(compute, model, ids), make_cache)


# Equal to the modules


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_golden_variants(name, taken):
    known = ChatGLMConfig().to_dict()
    fields = {key: value for key, value in VARIANTS[name].items() if key in known}
    if name.startswith("rope_ratio4"):
        fields["rope_ratio"] = 4
    model = create_variant(name, **fields).quantize(4)
    if model.config.multi_query_attention and model.config.rmsnorm:
        check_steps(model, taken)
        check_prompt(model, taken, draw_ids(model, 40, 2), lambda: fill(model, 5, 2))
    else:  # C has neither one key/value head for each query head nor LayerNorm
        take_steps(model, fill(model), count=1)
        assert taken == [False]


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 8},
        {"group_size": 128, "hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 384},
        {"add_bias_linear": True},
        {"add_qkv_bias": False},
        {"kv_channels": 12, "num_attention_heads": 3, "multi_query_group_num": 3},
        {"kv_channels": 20, "num_attention_heads": 2, "multi_query_group_num": 1},
        {"kv_channels": 4, "num_attention_heads": 6},
        {"kv_channels": 40, "num_attention_heads": 6},
        {"kv_channels": 256, "num_attention_heads": 2},
        {"num_attention_heads": 16, "multi_query_group_num": 1},
        {"num_attention_heads": 40},  # 20 to a key/value head: more than a vector has lanes
        {"hidden_size": 50, "ffn_hidden_size": 100},
        {"hidden_size": 1034, "ffn_hidden_size": 1030},
    ],
    ids=str,
)
def test_formats_and_sizes(isa, fields, taken):
    model = create(**fields)
    check_steps(model, taken, batch=2)
    check_prompt(model, taken, draw_ids(model, 40, 2))


@pytest.mark.parametrize("length", [1, 33, 256, 512, 700])  # layer.c computes 256 rows at a time
def test_contexts_and_prompts(length, taken):
    model = create(num_attention_heads=6)
    check_steps(model, taken, length, batch=3)
    check_prompt(model, taken, draw_ids(model, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, {"kv_channels": 12, "num_attention_heads": 3}], ids=str)
def test_caches_of_16_bits(dtype, fields, taken):
    model = create(**{**fields, "multi_query_group_num": 1})
    check_steps(model, taken, 600, batch=2, dtype=dtype)
    model.transformer.cache_dtype = dtype
    check_prompt(model, taken, draw_ids(model, 80))


def test_prompt_after_a_kept_cache(taken):
    model = create(num_attention_heads=6)
    check_prompt(model, taken, draw_ids(model, 300), lambda: fill(model, 1100))
    check_prompt(model, taken, draw_ids(model, 100, 3), lambda: fill(model, 1100, 3))


@pytest.mark.parametrize(("length", "piece"), [(12, 1), (700, 300)])
def test_pieces_give_the_same_as_the_whole(length, piece, taken):
    check_pieces(create(), length, piece, torch.float32)
    assert all(taken)


@pytest.mark.parametrize("dtype", cpu_layers.CACHE_TYPES)
@pytest.mark.parametrize("num_heads", [6, 34], ids="{} heads".format)
def test_tokens_alone_give_the_same_as_a_prompt(isa, num_heads, dtype, taken):
    """Over several blocks of keys, and with bundles of heads that are filled in part."""
    model = create(num_attention_heads=num_heads, num_layers=1)
    check_pieces(model, 530, 1, dtype)
    check_pieces(model, 1100, 37, dtype)
    assert all(taken)


def check_pieces(model, length, piece, dtype):
    model.transformer.cache_dtype = dtype
    whole, cache, ids = ChatGLMCache(), ChatGLMCache(), draw_ids(model, length)
    expected = compute(model, ids, whole)
    pieces = [compute(model, part, cache) for part in ids.split(piece, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    for layer, other in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_memory_of_a_long_prompt(monkeypatch):
    """Rows are computed in blocks, so the memory hardly grows with the prompt."""
    model, sizes = create(hidden_size=512, ffn_hidden_size=1024, num_layers=1), []
    allocate = cpu_backend.allocate
    compute(model, draw_ids(model, 1), ChatGLMCache())  # packs the weights
    monkeypatch.setattr(cpu_backend, "allocate", lambda n: sizes.append(n) or allocate(n))
    for length in (256, 2000):
        compute(model, draw_ids(model, length), ChatGLMCache())
    rows = 256 * 4 * (512 + 128 + 64 + 2048 + 1024)
    assert len(sizes) == 2 and rows < sizes[0] <= sizes[1] < 1.3 * sizes[0]


def test_rows_of_different_lengths(taken):
    model = create(num_attention_heads=6)

    def make_cache():
        return RaggedCache([fill(model, length, seed=length) for length in (1, 1100, 30, 511)])

    compare(taken, partial(take_steps, model, batch=4), make_cache)


# Independent of other rows and of threads


def test_row_depends_on_no_other_row(isa, taken):
    model = create(4, 128, hidden_size=128, kv_channels=32, ffn_hidden_size=128)
    rows = [fill(model, (7 + 331 * i) % 1200 + 1, seed=i) for i in range(16)]
    expected = take_steps(model, RaggedCache(rows), 16)
    for count, first in ((1, 0), (1, 13), (2, 3), (3, 9), (5, 10), (8, 1), (8, 8)):
        chosen = rows[first : first + count]
        for row in chosen:
            row.crop(-3)
        logits = take_steps(model, RaggedCache(chosen), count, first=first)
        assert torch.equal(logits, expected[first : first + count])
    assert taken == 24 * [True]


def test_prompt_depends_on_no_other_prompt(isa, taken):
    model = create()
    ids = draw_ids(model, 150, 5)
    expected = compute(model, ids, ChatGLMCache())
    for first, count in ((0, 1), (4, 1), (1, 3)):
        logits = compute(model, ids[first : first + count], ChatGLMCache())
        assert torch.equal(logits, expected[first : first + count])
    assert taken == 4 * [True]


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(
    "way", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 128}, {"bits": 4, "output_bits": 8}]
)
def test_token_is_the_same_kept_recomputed_batched_and_alone(
    way, dtype, tiny_checkpoint, tiny_tokenizer, taken
):
    model = load(tiny_checkpoint, dtype=torch.float32).eval().quantize(**way)
    model.base_model.cache_dtype = dtype
    ids = torch.tensor([tiny_tokenizer.encode("[Round 1]\n\n问：你好\n\n答：你好！我是谁？")])
    others = (ids + torch.arange(4)[:, None] * 7) % 1000 + 300
    recomputed = compute(model, ids, ChatGLMCache())
    batched = compute(model, torch.cat((others, ids)), ChatGLMCache())[4:]
    kept = ChatGLMCache()
    alone = torch.cat([compute(model, token, kept) for token in ids.split(1, dim=1)], dim=1)
    assert torch.equal(batched, recomputed) and torch.equal(alone, recomputed)
    assert all(taken)


@pytest.mark.parametrize("with_openmp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_threads_change_nothing(with_openmp, tmp_path, monkeypatch, taken):
    def compute_with_threads(num_threads):
        model = create(hidden_size=1040, ffn_hidden_size=1100)
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        logits = take_steps(model, RaggedCache([fill(model, n) for n in (3, 1100, 700)]), batch=3)
        prompt = compute(model, draw_ids(model, 300), ChatGLMCache())
        return torch.cat((logits.flatten(0, 1), prompt[0]))

    expected = compute_with_threads(1)
    if not with_openmp:  # compiles
        flags = [*build_cpu.FLAGS, *build_cpu.choose_isa_flags(False), "-O1"]
        flags += ["-DGOMP_parallel=missing"]
        command = [*build_cpu.find_compilers()[0], *flags]
        library = build_cpu.load(build_cpu.compile_into(tmp_path, "x.so", command))
        monkeypatch.setattr(cpu_backend, "get_library", lambda: (library, None))
    for num_threads in (1, 2, 5):
        assert torch.equal(compute_with_threads(num_threads), expected)
    assert taken == 16 * [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_is_rounded_as_by_torch(isa, dtype, taken):
    """A bias is cached, where the weight is 0: all numbers, and some between them."""
    sizes = dict.fromkeys(("kv_channels", "num_attention_heads", "multi_query_group_num"), 256)
    model = create(**sizes, num_layers=1, hidden_size=2, ffn_hidden_size=2)
    linear = model.transformer.encoder.layers[0].self_attention.query_key_value
    linear.weight.data = torch.zeros_like(linear.weight)
    numbers, following = (
        torch.arange(i - 2**15, i + 2**15).to(torch.int16).view(dtype).float() for i in (0, 1)
    )
    middle = (numbers.double() + following.double()).div(2).float()
    infinity = torch.tensor(torch.inf)
    above, below = torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)
    # NaNs of which 16 bits alone would be infinity, or overflow
    special = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F7FFFFF], dtype=torch.int32)
    special = special.view(torch.float32).repeat(65536 // 4)
    for values in (numbers, middle, above, below, special):
        linear.bias.data = torch.cat((torch.zeros(2 * 65536), values))
        cache = ChatGLMCache()
        cache.update(*torch.zeros(2, 1, 256, 1, 256, dtype=dtype), 0)
        take_steps(model, cache, count=1)
        stored, expected = cache.layers[0].values[0, :, 1].flatten(), values.to(dtype)
        torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    assert taken == 5 * [True]


# When the modules are called


def is_taken(model, taken, cache=None, **kwargs) -> bool:
    """Whether C computes a step; it must give the same as the modules."""
    taken.clear()
    kwargs = kwargs or {"input_ids": IDS}
    with torch.no_grad():
        cache = fill(model) if cache is None else cache
        logits = model(**kwargs, past_key_values=cache).logits
        (is_in_c,) = taken
        if is_in_c:
            with calling_modules():
                expected = model(**kwargs, past_key_values=fill(model, 5, len(logits))).logits
            assert_close(logits, expected)
    return is_in_c


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "name",
    [
        "", "input_layernorm", "self_attention", "self_attention.query_key_value",
        "self_attention.dense", "post_attention_layernorm", "mlp", "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h", None,
    ],
)  # fmt: skip
def test_changed_modules(name, taken):
    model = create()
    encoder = model.transformer.encoder
    module = encoder if name is None else encoder.layers[1].get_submodule(name)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert not is_taken(model, taken)
        handle.remove()
        assert is_taken(model, taken)
    if name is not None:
        path = f"layers.1.{name}".rstrip(".")
        encoder.set_submodule(path, Wrapper(module))
        assert not is_taken(model, taken)
        encoder.set_submodule(path, module)
        assert is_taken(model, taken)
    add_hook_to_module(module, ModelHook())  # replaces the instance's forward
    assert not is_taken(model, taken)


def test_peft_adapter_after_the_first_token(tiny_checkpoint, taken):
    peft = pytest.importorskip("peft")
    model = load(tiny_checkpoint, dtype=torch.float32).eval().quantize(4)
    expected, cache = take_steps(model, fill(model), count=2), fill(model)
    assert torch.equal(take_steps(model, cache, count=1), expected[:, :1])
    config = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    taken.clear()
    adapted_model = peft.get_peft_model(model, config).eval()
    adapted = compute(adapted_model, torch.tensor([[8]]), cache)
    assert taken == [False] and (adapted - expected[:, 1:]).abs().max() > 1e-2
    cache.crop(-1)
    with adapted_model.disable_adapter():
        assert_close(compute(adapted_model, torch.tensor([[8]]), cache), expected[:, 1:])
    cache.crop(-1)
    plain = adapted_model.unload()
    assert torch.equal(compute(plain, torch.tensor([[8]]), cache), expected[:, 1:]) and taken[-1]


def test_training_mode(taken):
    model = create(hidden_dropout=0.5)
    layers = model.transformer.encoder.layers
    for module in (layers[1], layers[0].self_attention, model.transformer):
        module.training = True
        assert not is_taken(model, taken)
        module.training = False
        assert is_taken(model, taken)


def test_other_inputs(taken):
    model, two, padded = create(), torch.tensor([[7, 8]]), torch.ones(2, 11, dtype=torch.long)
    padded[0, :2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_taken(model, taken)
    for kwargs in (
        {"input_ids": IDS, "output_hidden_states": True},
        {"input_ids": IDS, "output_attentions": True},
        {"input_ids": two, "position_ids": torch.tensor([[5, 7]])},
    ):
        assert not is_taken(model, taken, **kwargs)
    assert is_taken(model, taken, input_ids=two)
    for mask in (padded, torch.ones(2, 1, 6, 11, dtype=torch.bool), torch.ones_like(padded)):
        kwargs = {"input_ids": draw_ids(model, 6, 2), "attention_mask": mask}
        is_plain = mask.ndim == 2 and bool(mask.all())
        assert is_taken(model, taken, fill(model, 5, 2), **kwargs) == is_plain
    AttentionInterface.register("own", eager_attention_forward)
    AttentionMaskInterface.register("own", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    for name in ("eager", "own"):
        model.set_attn_implementation(name)
        assert is_taken(model, taken) == (name == "eager")


def test_gradients(taken):
    """Where they are enabled, the modules decide which tensors need one."""
    model = create()
    embeds = torch.randn(1, 1, 64, requires_grad=True)
    model.transformer.requires_grad_(False)
    model(inputs_embeds=embeds, past_key_values=fill(model)).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0
    norm = model.transformer.encoder.layers[0].input_layernorm.weight
    norm.requires_grad_(True)
    model(IDS, past_key_values=fill(model)).logits.sum().backward()
    assert norm.grad.abs().sum() > 0
    cache = fill(model)
    first = cache.layers[0]
    first.keys, first.buffers = first.keys.clone().requires_grad_(), None
    assert not compute(model, IDS, cache).requires_grad
    assert taken == [False, False, True]


def test_other_caches(taken):
    model, ids = create(), torch.tensor([[5, 6, 7]])
    cache = ChatGLMCache()
    expected = torch.cat([compute(model, ids, cache) for _ in range(2)])
    cache.reset()
    assert torch.equal(compute(model, ids, cache), expected[:1])
    assert taken == 3 * [True]
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        taken.clear()
        assert_close(torch.cat([compute(model, ids, cache) for _ in range(2)]), expected)
        assert taken == [False, False]
    with torch.no_grad():
        assert_close(model(ids, use_cache=False).logits, expected[:1])
    assert not taken[-1]


def test_caches_that_c_cannot_write(taken):
    """C checks no bounds."""
    model = create()
    for empty in (ChatGLMCache(), fill(model)):
        empty.reset()
        take_steps(model, RaggedCache([fill(model), empty]), 2, count=1)
    rows = [fill(model), fill(model, dtype=torch.float16)]
    logits = take_steps(model, RaggedCache(rows), 2, count=1)
    assert_close(logits[:1], take_steps(model, fill(model), count=1))
    assert taken == [False, False, False, True]
    cache = fill(model)
    cache.layers[1].__class__ = type("OtherLayer", (ChatGLMCacheLayer,), {})
    assert not is_taken(model, taken, cache)
    model.transformer.cache_dtype = torch.float64
    assert not is_taken(model, taken, ChatGLMCache())


def change_longer_layer(cache):
    """The second layer holds more blocks of keys than the first."""
    cache.update(*torch.randn(2, 1, 2, 1500, 16), 1)


def change_values(cache):
    layer = cache.layers[1]
    layer.values, layer.buffers = layer.values[:, :, :2], None


def change_missing_layer(cache):
    del cache.layers[1]


def change_shared_layer(cache):
    cache.layers[1] = cache.layers[0]


def change_device(cache):
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")


@pytest.mark.parametrize(
    "change",
    [
        change_longer_layer, change_values, change_missing_layer, change_shared_layer,
        change_device,
    ],
)  # fmt: skip
def test_layers_of_a_cache_that_differ(change, taken):
    model, cache = create(), fill(create())
    change(cache)
    with suppress(RuntimeError, NotImplementedError):  # of the modules
        take_steps(model, cache, count=1)
    assert taken == [False]


def test_rows_that_share_a_cache(taken):
    model, cache = create(), fill(create())
    take_steps(model, RaggedCache([cache, cache]), 2, count=1)
    assert taken == [False] and cache.layers[1].get_seq_length() == 7


def test_buffers_of_another_cache(taken):
    """An error instead of a write behind them."""
    model = create()
    for other, message in (
        (fill(create(kv_channels=8)), "CPU kernels got a tensor"),
        (fill(model, batch=2), "buffers of the cache"),
    ):
        cache = fill(model)
        cache.layers[1].buffers = other.layers[1].buffers
        with pytest.raises(RuntimeError, match=message):
            take_steps(model, cache, count=1)
    assert taken == [True, True]


def test_cache_of_more_than_2_to_31_elements(taken):
    model, cache = create(), fill(create())
    expected = take_steps(model, fill(model))
    for layer in cache.layers:
        buffers = [create_sparse(2**33 + 2**12).view(torch.float32) for _ in range(2)]
        layer.buffers = [x[: 2**31].view(1, 2, 2**26, 16) for x in buffers]
        for buffer, held in zip(layer.buffers, (layer.keys, layer.values), strict=True):
            buffer[:, :, :5] = held
        layer.keys, layer.values = (x[:, :, :5] for x in layer.buffers)
    assert torch.equal(take_steps(model, cache), expected)
    assert taken == 6 * [True]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"input_ids": torch.tensor([[7, 8, 9]]), "position_ids": torch.tensor([[5]])},
        {"input_ids": IDS, "position_ids": torch.tensor([[5, 6]])},
        {"inputs_embeds": torch.ones(1, 1, 48)},
        {"inputs_embeds": torch.ones(1, 1, 65)},
    ],
)
@torch.no_grad()
def test_inputs_of_other_sizes(kwargs, taken):
    model = create()
    with suppress(RuntimeError):  # of the modules, which broadcast a single position
        model(**kwargs, past_key_values=fill(model))
    assert taken == [False]


def test_sizes_that_c_cannot_compute(taken):
    model = create()
    layer = model.transformer.encoder.layers[1]
    assert is_taken(model, taken)
    for module, name, value in (
        (layer.self_attention, "num_heads", 3),
        (layer.self_attention, "head_dim", 32),
        (layer.mlp, "dense_4h_to_h", layer.mlp.dense_h_to_4h),
        (layer.mlp.dense_h_to_4h, "group_size", 32),
        (model.config, "num_attention_heads", 3),
    ):
        old = getattr(module, name)
        setattr(module, name, value)
        assert not cpu_layers.is_model_plain(model.transformer)
        setattr(module, name, old)
        assert cpu_layers.is_model_plain(model.transformer)


def test_default_device_of_torch(taken):
    model = create()
    expected, state = take_steps(model, fill(model)), create().state_dict()
    ids, cache = torch.tensor([[5]]), fill(model)
    with torch.device("meta"):
        logits, found = compute(model, ids, cache), model.state_dict()
    assert torch.equal(logits, expected[:, :1])
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_cache_of_another_model(taken):
    model = create()
    for cache, batch in (
        (fill(create(kv_channels=8)), 1),
        (fill(create(multi_query_group_num=4)), 1),
        (fill(model, 5, 1), 3),
        (fill(model, 5, 3), 1),
        (fill(model, 5, 2), 3),
        (RaggedCache([fill(model), fill(model)]), 3),  # a row is missing
    ):
        with pytest.raises(RuntimeError):
            take_steps(model, cache, batch, count=1)
    assert taken == 6 * [False]


def test_parameters_that_c_cannot_read(taken):
    changes = (lambda x: x.repeat_interleave(2)[::2], torch.Tensor.double)
    for name in ("input_layernorm.weight", "self_attention.query_key_value.bias"):
        for change in changes:
            model = create()
            expected = take_steps(model, fill(model), count=1)
            parameter = model.transformer.encoder.layers[1].get_parameter(name)
            parameter.data = change(parameter.data)
            assert_close(take_steps(model, fill(model), count=1), expected)
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.weight = nn.Parameter(torch.ones(1))  # shorter than C would read
    assert not is_taken(model, taken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_16_bits(dtype, taken):
    model = create().to(dtype)
    assert not is_taken(model, taken, ChatGLMCache())
    model = create(fp32_residual_connection=True).to(dtype)
    for module in model.modules():
        if isinstance(module, modeling_chatglm.RMSNorm):
            module.float()
    with torch.no_grad():
        model.transformer(IDS, past_key_values=fill(model))
    assert not taken[-1]


def test_compiled_code_calls_the_modules():
    inputs = dict.fromkeys([*cpu_layers.ARGUMENTS, "prefix"])
    inputs |= {"hidden_states": torch.zeros(1, 1, 64), "rotary": [torch.zeros(1)]}
    compiled = torch.compile(cpu_layers.are_inputs_plain, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert cpu_layers.are_inputs_plain(inputs)
        assert not compiled(inputs)


@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
@torch.no_grad()
def test_prefix(name, taken):
    fields = {"pre_seq_len": 4, "prefix_projection": name == "prefix_proj"}
    model = create_variant(name, **fields).quantize(8)
    logits = take_steps(model, cache := ChatGLMCache())
    assert taken == [False, True, True]
    with calling_modules():
        assert_close(logits, take_steps(model, expected := ChatGLMCache()))
    assert_same_cache(cache, expected)
    assert cache.get_seq_length() == 3 and cache.layers[0].get_seq_length() == 7


# Whole answers


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generate(bundled, settings, taken):
    ids = torch.tensor([[64790, 64792, 5, 9, 30, 5, 9]]) % bundled.config.padded_vocab_size
    settings = settings | {"max_new_tokens": 30, "min_new_tokens": 30}
    generated = bundled.generate(ids, **settings)
    if "prompt_lookup_num_tokens" in settings:  # the first candidates come with the prompt
        taken.pop(0)
    assert len(taken) > 5 and all(taken)
    with calling_modules():
        assert torch.equal(bundled.generate(ids, **settings), generated)


# What goes wrong


class Failing:
    """A C function that reports after some calls that there is no memory."""

    def __init__(self, function, first):
        self.function, self.first, self.calls = function, first, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args) if self.calls <= self.first else -1


@contextmanager
def failing_in_c(model, first):
    library = build_cpu.get_library()[0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError, match="free some"):
        failing = Failing(library.chatglm_compute_layer, first)
        patch.setattr(library, "chatglm_compute_layer", failing)
        yield
    assert failing.calls == first + 1


@contextmanager
def failing_in_a_module(model, index):
    """The modules are called, and the cache lacks the later layers after the error."""

    def fail(*args):
        raise KeyError

    handle = model.transformer.encoder.layers[index].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        yield
    handle.remove()


@pytest.mark.parametrize(
    ("failing", "first"),  # of four layers, the prompt's first
    [
        *((failing_in_c, first) for first in (0, 2, 12)),
        *((failing_in_a_module, first) for first in (0, 2)),
    ],
)
def test_chat_recovers(failing, first, bundled, tiny_tokenizer):
    """The same cache serves the next question."""
    expected = bundled.chat(tiny_tokenizer, "讲个笑话", do_sample=False)[0]
    cache = ChatGLMCache()
    arguments = tiny_tokenizer, "讲个笑话", [], cache
    with failing(bundled, first):
        list(bundled.stream_chat(*arguments, do_sample=False))
    *_, (answer, _) = bundled.stream_chat(*arguments, do_sample=False)
    assert answer == expected and cache.get_seq_length() > 0, "it was not reset again"


def test_another_thread_may_save_the_model(taken):
    model = create(8, hidden_size=512, ffn_hidden_size=1024)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = take_steps(model, fill(model), count=40)

    def is_saved(_):
        saved = model.state_dict()
        return all(torch.equal(saved[name], value) for name, value in state.items())

    with ThreadPoolExecutor(1) as pool:
        outcomes = pool.map(is_saved, range(100))
        for _ in range(5):
            assert torch.equal(take_steps(model, fill(model), count=40), expected)
        assert all(outcomes)
    assert taken == 240 * [True]


def test_changed_weights_are_seen(taken):
    model, other = create(), create()
    for parameter in other.transformer.encoder.parameters():
        if parameter.ndim == 1:  # norms, biases, scales
            parameter.data *= 1.5
    before = take_steps(model, fill(model))
    model.transformer.encoder.load_state_dict(other.transformer.encoder.state_dict())
    after = take_steps(model, fill(model))
    assert torch.equal(after, take_steps(other, fill(other))) and not torch.equal(after, before)
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)
    assert not torch.equal(take_steps(model, fill(model)), after)
    assert taken == 12 * [True]
