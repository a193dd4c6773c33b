"""The blocks in C against the modules called one by one; and when they are not taken."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from test_modeling_chatglm import VARIANT_NAMES, VARIANT_TENSORS, VARIANTS, create_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from chatglm2 import ChatGLMCache, ChatGLMConfig, ChatGLMForConditionalGeneration, modeling_chatglm
from chatglm2.generation_chatglm import ChatGLMCacheLayer, RaggedCache
from chatglm2.kernels import build_cpu, cpu_backend, cpu_layers
from chatglm2.modeling_chatglm import eager_attention_forward
from chatglm2.quantization import QuantizedLinear, dequantize
from chatglm2.serving.batching import Batcher, Request

pytestmark = pytest.mark.usefixtures("need_library")
WAYS = [(8, None), (4, None), (4, 128)]
WAY_NAMES = ["int8", "int4", "g128"]
DTYPES = [torch.float16, torch.bfloat16]
PROMPT_LENGTHS = (1, 2, 31, 32, 33, 255, 256, 257, 700)  # about the bounds of the blocks in layer.c
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
    """In INT4, and exact for prompts, so that ids can be compared."""
    model = load(tiny_checkpoint, dtype=torch.float32).eval().quantize(4)
    model.transformer.exact_prefill = True
    return model


@pytest.fixture
def reasons(monkeypatch):
    """What `fused_step_supported` returns: None for each forward that is computed in C."""
    found = []

    def record(*args, **kwargs):
        found.append(supported(*args, **kwargs))
        return found[-1]

    supported = cpu_layers.fused_step_supported
    monkeypatch.setattr(cpu_layers, "fused_step_supported", record)
    return found


@contextmanager
def one_by_one():
    """Call the modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layers, "fused_step_supported", lambda *args, **kwargs: "not asked for")
        yield


def fill(model, length, batch=1, seed=0, dtype=torch.float32) -> ChatGLMCache:
    """Return a cache of random keys and values."""
    cache, generator = ChatGLMCache(), torch.Generator().manual_seed(seed)
    config = model.config
    shape = batch, config.num_key_value_heads, length, config.kv_channels
    for i in range(config.num_layers):
        cache.update(*torch.randn(2, *shape, generator=generator).to(dtype), i)
    return cache


@torch.no_grad()
def take_steps(model, cache, batch=1, count=3) -> torch.Tensor:
    """Feed tokens; return their logits [b, count, V]."""
    logits = []
    for step in range(count):
        ids = (torch.arange(batch)[:, None] * 7 + step * 3 + 5) % model.config.padded_vocab_size
        positions = None
        if isinstance(cache, RaggedCache):
            positions = torch.tensor([[row.get_seq_length()] for row in cache.rows])
        logits.append(model(ids, positions, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def compute(model, ids, cache, is_prompt=False) -> torch.Tensor:
    return model(ids, past_key_values=cache, is_prompt=is_prompt).logits


def draw_ids(model, length, batch=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.padded_vocab_size, (batch, length), generator=generator)


def assert_close(actual, expected, tolerance=1e-5):
    """Up to a part of the greatest number."""
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=atol)


def assert_same_cache(actual, expected, tolerance=1e-5):
    assert len(actual.layers) == len(expected.layers)
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        assert layer.keys.dtype == other.keys.dtype
        assert_close(layer.keys, other.keys, tolerance)
        assert_close(layer.values, other.values, tolerance)


def choose_tolerance(dtype):
    """Return that for a cache's dtype: a key that differs by rounding may be rounded otherwise."""
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


def check(model, reasons, length=9, batch=1, dtype=torch.float32):
    """Take steps in both ways; the fused one is to be taken."""
    reasons.clear()
    cache, expected_cache = (fill(model, length, batch, dtype=dtype) for _ in range(2))
    logits = take_steps(model, cache, batch)
    assert reasons == 3 * [None]
    with one_by_one():
        expected = take_steps(model, expected_cache, batch)
    assert_close(logits, expected, choose_tolerance(dtype))
    assert_same_cache(cache, expected_cache, choose_tolerance(dtype))


def check_prompt(model, reasons, ids, make_cache=ChatGLMCache):
    """Compute a prompt in both ways."""
    reasons.clear()
    cache, expected_cache = make_cache(), make_cache()
    logits = compute(model, ids, cache)
    assert reasons == [None]
    with one_by_one():
        expected = compute(model, ids, expected_cache)
    tolerance = choose_tolerance(cache.layers[0].keys.dtype)
    assert_close(logits, expected, tolerance)
    assert_same_cache(cache, expected_cache, tolerance)


def check_int8_prompt(reasons, length, batch=1, num_held=0, **fields):
    """The same with activations of 8 bits; one layer, as each makes differences greater.

    Seldom an activation that differs by rounding becomes another of the 255 levels.
    """
    reasons.clear()
    model = create(**{"num_layers": 1, **fields})
    ids = draw_ids(model, length, batch)
    exact, rounded = (compute(model, ids, fill(model, num_held, batch), i) for i in (False, True))
    assert reasons == [None, None]
    with one_by_one():
        expected = compute(model, ids, fill(model, num_held, batch), True)
    error, effect = (rounded - expected).abs(), (rounded - exact).abs()
    assert error.median() < 0.01 * effect.median() and error.norm() < 0.3 * effect.norm()


# Equal to the modules


@pytest.mark.parametrize("name", VARIANT_NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_golden_variants(isa, name, bits, reasons):
    known = ChatGLMConfig().to_dict()
    fields = {key: value for key, value in VARIANTS[name].items() if key in known}
    if name.startswith("rope_ratio4"):
        fields["rope_ratio"] = 4
    prefix = f"{name}.w."
    tensors = VARIANT_TENSORS.items()
    weights = {k.removeprefix(prefix): value for k, value in tensors if k.startswith(prefix)}
    model = create_model(weights=weights, **fields).quantize(bits)
    if not model.config.multi_query_attention or not model.config.rmsnorm:
        take_steps(model, fill(model, 5), count=1)
        why = (
            "the attention heads are laid out" if model.config.rmsnorm else "a norm is a LayerNorm"
        )
        assert why in reasons[0]
    else:
        check(model, reasons)
        check_prompt(model, reasons, draw_ids(model, 40, 2), lambda: fill(model, 5, 2))


@pytest.mark.parametrize(("bits", "group_size"), WAYS, ids=WAY_NAMES)
def test_bundled_checkpoint(isa, bits, group_size, tiny_checkpoint, reasons):
    model = load(tiny_checkpoint, dtype=torch.float32).eval().quantize(bits, group_size)
    check(model, reasons, batch=3)
    check_prompt(model, reasons, draw_ids(model, 40))


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_channels": 6, "num_attention_heads": 3, "multi_query_group_num": 3},
        {"kv_channels": 7, "num_attention_heads": 2, "multi_query_group_num": 1},
        {"kv_channels": 2, "num_attention_heads": 6},
        {"kv_channels": 40, "num_attention_heads": 6},
        {"kv_channels": 256, "num_attention_heads": 2},
        {"num_attention_heads": 16, "multi_query_group_num": 1},
        {"num_attention_heads": 40},  # 20 to a key/value head: more than a vector has lanes
        {"hidden_size": 50, "ffn_hidden_size": 100},
        {"hidden_size": 1034, "ffn_hidden_size": 1030},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_odd_sizes(isa, fields, reasons):
    model = create(**fields)
    check(model, reasons, batch=2)
    check_prompt(model, reasons, draw_ids(model, 40, 2))
    check_int8_prompt(reasons, 40, 2, **fields)


@pytest.mark.parametrize("length", [1, 63, 64, 510, 511, 512, 513, 1100])
def test_contexts(isa, length, reasons):
    check(create(num_attention_heads=6), reasons, length, batch=3)


@pytest.mark.parametrize("fields", [{"add_bias_linear": True}, {"add_qkv_bias": False}], ids=str)
def test_biases(fields, reasons):
    check(create(**fields), reasons)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, {"kv_channels": 6, "num_attention_heads": 3}], ids=str)
def test_caches_of_16_bits(isa, dtype, fields, reasons):
    model = create(**{**fields, "multi_query_group_num": 1})
    check(model, reasons, 600, batch=2, dtype=dtype)
    model.transformer.cache_dtype = dtype
    check_prompt(model, reasons, draw_ids(model, 80))


# Prompts


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_prompts(isa, length, reasons):
    model = create(num_attention_heads=6)
    check_prompt(model, reasons, draw_ids(model, length))
    check_int8_prompt(reasons, length, num_attention_heads=6)


@pytest.mark.parametrize(("bits", "group_size"), WAYS, ids=WAY_NAMES)
def test_int8_prompts(isa, bits, group_size, reasons):
    sizes = {"hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 384}
    check_int8_prompt(reasons, 40, bits=bits, group_size=group_size, **sizes)


def test_batch_of_prompts(isa, reasons):
    model = create()
    check_prompt(model, reasons, draw_ids(model, 100, 3))  # the blocks end within rows
    check_int8_prompt(reasons, 100, 3)


def test_prompt_after_a_kept_cache(isa, reasons):
    model = create(num_attention_heads=6)
    check_prompt(model, reasons, draw_ids(model, 300), lambda: fill(model, 1100))
    check_prompt(model, reasons, draw_ids(model, 40, 2), lambda: fill(model, 1100, 2))
    check_int8_prompt(reasons, 300, num_held=1100)


def test_prompt_in_pieces_is_that_of_one(isa, reasons):
    model = create()
    ids = draw_ids(model, 700)
    for is_prompt in (False, True):
        whole, cache = ChatGLMCache(), ChatGLMCache()
        expected = compute(model, ids, whole, is_prompt)
        pieces = [compute(model, piece, cache, is_prompt) for piece in ids.split(300, dim=1)]
        assert torch.equal(torch.cat(pieces, dim=1), expected)
        for layer, other in zip(cache.layers, whole.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
            assert torch.equal(layer.values, other.values)
    assert reasons == 8 * [None]


def test_prompt_depends_on_no_other_prompt(isa, reasons):
    model = create()
    ids = draw_ids(model, 150, 5)
    for is_prompt in (False, True):
        expected = compute(model, ids, ChatGLMCache(), is_prompt)
        for first, count in ((0, 1), (4, 1), (1, 3)):
            logits = compute(model, ids[first : first + count], ChatGLMCache(), is_prompt)
            assert torch.equal(logits, expected[first : first + count])
    assert reasons == 8 * [None]


def test_tokens_after_a_prompt_are_exact(reasons):
    """Their role decides: several tokens, such as an assistant's, are no prompt."""
    model = create()
    ids = draw_ids(model, 12)
    cache, other = fill(model, 5), fill(model, 5)
    together = compute(model, ids, cache)
    single = torch.cat([compute(model, ids[:, i : i + 1], other) for i in range(12)], dim=1)
    assert torch.equal(together, single)
    assert reasons == 13 * [None]


def test_memory_of_a_long_prompt(monkeypatch, reasons):
    """It is computed in blocks: only the positions' partial results become more."""
    model, sizes = create(hidden_size=512, ffn_hidden_size=1024, num_layers=1), []
    allocate = cpu_backend.allocate

    def record(size):
        sizes.append(size)
        return allocate(size)

    compute(model, draw_ids(model, 1), ChatGLMCache())  # weights are packed
    monkeypatch.setattr(cpu_backend, "allocate", record)
    for length in (256, 2000):
        compute(model, draw_ids(model, length), ChatGLMCache(), is_prompt=True)
    rows = 256 * 4 * (512 + 128 + 64 + 2048 + 1024)
    assert len(sizes) == 2 and rows < sizes[0] <= sizes[1] < 1.3 * sizes[0]
    assert reasons == 3 * [None]


@torch.no_grad()
def test_rows_of_different_lengths(isa, reasons):
    model = create(num_attention_heads=6)
    lengths = 1, 1100, 30, 511
    rows, expected_rows = (
        [fill(model, length, seed=length) for length in lengths] for _ in range(2)
    )
    logits = take_steps(model, RaggedCache(rows), batch=4)
    assert reasons == 3 * [None]
    with one_by_one():
        expected = take_steps(model, RaggedCache(expected_rows), batch=4)
    assert_close(logits, expected)
    for row, other, length in zip(rows, expected_rows, lengths, strict=True):
        assert row.get_seq_length() == length + 3
        assert_same_cache(row, other)


def test_cropped_and_reordered_caches(reasons):
    model = create()
    caches = fill(model, 300, 2), fill(model, 300, 2)
    logits = []
    for cache, path in zip(caches, (one_by_one, torch.no_grad), strict=True):
        with path(), torch.no_grad():
            take_steps(model, cache, 2, count=2)
            cache.crop(-7)
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(take_steps(model, cache, 2))
    assert reasons == 5 * [None]
    assert_close(logits[1], logits[0])
    assert_same_cache(caches[1], caches[0])


# Independent of other rows and of threads


@pytest.mark.parametrize(("bits", "group_size"), WAYS, ids=WAY_NAMES)
@torch.no_grad()
def test_row_depends_on_no_other_row(isa, bits, group_size, reasons):
    sizes = {"hidden_size": 128, "kv_channels": 32, "ffn_hidden_size": 128}
    model = create(bits, group_size, **sizes)
    rows = [fill(model, (7 + 331 * i) % 1200 + 1, seed=i) for i in range(16)]
    ids = torch.arange(16)[:, None]

    def compute(first, count):
        chosen = rows[first : first + count]
        positions = torch.tensor([[row.get_seq_length()] for row in chosen])
        cache = RaggedCache(chosen)
        logits = model(ids[first : first + count], positions, past_key_values=cache).logits
        new = [
            torch.stack([x[0, :, -1] for la in row.layers for x in (la.keys, la.values)])
            for row in chosen
        ]
        for row in chosen:
            row.crop(-1)
        return logits, torch.stack(new)

    expected, expected_keys = compute(0, 16)
    for count, first in ((1, 0), (1, 13), (2, 3), (3, 9), (5, 10), (8, 1), (8, 8)):
        logits, keys = compute(first, count)
        assert torch.equal(logits, expected[first : first + count])
        assert torch.equal(keys, expected_keys[first : first + count])
    assert reasons == 8 * [None]


def compute_with_threads(monkeypatch, num_threads):
    model = create(hidden_size=1040, ffn_hidden_size=1100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    logits = take_steps(model, RaggedCache([fill(model, n) for n in (3, 1100, 700)]), batch=3)
    prompt = compute(model, draw_ids(model, 300), ChatGLMCache(), is_prompt=True)
    return torch.cat((logits.flatten(0, 1), prompt[0]))


def test_threads_change_nothing(monkeypatch, reasons):
    expected = compute_with_threads(monkeypatch, 1)
    for num_threads in (2, 5):
        assert torch.equal(compute_with_threads(monkeypatch, num_threads), expected)
    assert reasons == 12 * [None]


def test_without_openmp(tmp_path, monkeypatch, reasons):
    expected = compute_with_threads(monkeypatch, 1)
    command = [*build_cpu.find_compilers()[0], *build_cpu.FLAGS, *build_cpu.choose_isa_flags(False)]
    library = build_cpu.load(
        build_cpu.compile_into(tmp_path, "x.so", [*command, "-O1", "-pthread"])
    )
    monkeypatch.setattr(cpu_backend, "get_library", lambda: (library, None))
    for num_threads in (1, 2, 5):
        assert torch.equal(compute_with_threads(monkeypatch, num_threads), expected)
    assert reasons == 16 * [None]


# Exactness


@pytest.mark.parametrize(("factor", "bound"), [(1, 1), (20, 2.5), (1000, 2.5)])
@pytest.mark.parametrize(("bits", "group_size"), WAYS, ids=WAY_NAMES)
def test_products_are_as_exact_as_those_of_float32(isa, bits, group_size, factor, bound):
    """With outlier channels nearly: the others of a group are rounded as these, to 23 bits."""
    torch.manual_seed(0)
    layer = QuantizedLinear(1024, 256, bits, group_size)
    layer.weight.data, layer.weight_scale.data = layer.quantize(torch.randn(256, 1024))
    x = torch.randn(32, 1024)
    x[:, ::100] *= factor
    weight = dequantize(layer.weight, layer.weight_scale, bits, torch.float64)
    expected = x.double() @ weight.T
    error = (cpu_backend.matmul(x, layer) - expected).norm()
    assert error <= bound * (F.linear(x, weight.float()) - expected).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_is_rounded_as_by_torch(isa, dtype, reasons):
    """Values are the bias of a layer whose weight is 0: all numbers, and what lies between."""
    sizes = dict.fromkeys(("kv_channels", "num_attention_heads", "multi_query_group_num"), 256)
    model = create(**sizes, num_layers=1, hidden_size=2, ffn_hidden_size=2)
    linear = model.transformer.encoder.layers[0].self_attention.query_key_value
    linear.weight.data = torch.zeros_like(linear.weight)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    following = torch.arange(-(2**15) + 1, 2**15 + 1).to(torch.int16).view(dtype).float()
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
        assert torch.equal(stored.isnan(), expected.isnan())
        assert torch.equal(stored[~stored.isnan()], expected[~expected.isnan()])
    assert reasons == 5 * [None]


# When it is not taken


def explain(model, reasons, cache=None, **kwargs) -> str | None:
    """Return why a step is not taken; it then gives what the modules give."""
    reasons.clear()
    ids = torch.tensor([[7]])
    given = kwargs or {"input_ids": ids}
    own, other = (fill(model, 5) for _ in range(2)) if cache is None else (cache, cache)
    with torch.no_grad():
        logits = model(**given, past_key_values=own).logits
        (reason,) = reasons
        if cache is None and not model.training:
            with one_by_one():
                expected = model(**given, past_key_values=other).logits
            assert_close(logits, expected)
    return reason


def test_hooks(reasons):
    model = create()
    block = model.transformer.encoder.layers[1]
    names = [
        "", "input_layernorm", "self_attention", "self_attention.query_key_value",
        "self_attention.dense", "post_attention_layernorm", "mlp", "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]  # fmt: skip
    modules = [model.transformer.encoder, *(block.get_submodule(name) for name in names)]
    for module in modules:
        calls = []
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args, calls=calls: calls.append(1))
            assert explain(model, reasons).endswith("hooked")
            assert len(calls) == 2, "in both paths"
            calls.clear()
            handle.remove()
            assert explain(model, reasons) is None


def test_forward_of_an_instance(reasons):
    """As by accelerate, which moves weights to where they are needed."""
    model = create()
    add_hook_to_module(model.transformer.encoder.layers[0].mlp.dense_h_to_4h, ModelHook())
    assert explain(model, reasons) == "a layer is a QuantizedLinear or hooked"


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("index", [0, 1])
def test_wrapped_modules(index, reasons):
    expected = take_steps(create(), fill(create(), 5), count=1)
    for name in ("", "self_attention", "self_attention.query_key_value", "mlp", "input_layernorm"):
        model, path = create(), f"transformer.encoder.layers.{index}.{name}".rstrip(".")
        model.set_submodule(path, Wrapper(model.get_submodule(path)))
        reasons.clear()
        assert_close(take_steps(model, fill(model, 5), count=1), expected)
        assert len(reasons) == 1 and reasons[0].endswith("hooked")


class LowRank(Wrapper):
    """A LoRA."""

    def __init__(self, linear):
        super().__init__(linear)
        self.a = nn.Linear(linear.in_features, 2, bias=False)
        self.b = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.module(x) + self.b(self.a(x))


def test_adapter_that_is_attached_after_the_first_token(reasons):
    model = create()
    expected = take_steps(model, fill(model, 5), count=2)
    cache = fill(model, 5)
    assert torch.equal(take_steps(model, cache, count=1), expected[:, :1])
    mlp = model.transformer.encoder.layers[1].mlp
    linear, mlp.dense_4h_to_h = mlp.dense_4h_to_h, LowRank(mlp.dense_4h_to_h)
    reasons.clear()
    ids = torch.tensor([[8]])
    with torch.no_grad():
        adapted = model(ids, past_key_values=cache).logits
        cache.crop(-1)
        mlp.dense_4h_to_h = linear
        plain = model(ids, past_key_values=cache).logits
    assert reasons == ["a layer is a LowRank or hooked", None]
    assert torch.equal(plain, expected[:, 1:])
    assert (adapted - plain).abs().max() > 1e-2


def test_peft_adapter_after_the_first_token(tiny_checkpoint, reasons):
    peft = pytest.importorskip("peft")
    model = load(tiny_checkpoint, dtype=torch.float32).eval().quantize(4)
    expected, cache = take_steps(model, fill(model, 5), count=2), fill(model, 5)
    assert torch.equal(take_steps(model, cache, count=1), expected[:, :1])
    config = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    reasons.clear()
    adapted_model = peft.get_peft_model(model, config).eval()
    adapted = compute(adapted_model, torch.tensor([[8]]), cache)
    assert reasons == ["a layer is a Linear or hooked"]
    assert (adapted - expected[:, 1:]).abs().max() > 1e-2
    cache.crop(-1)
    with adapted_model.disable_adapter():
        assert_close(compute(adapted_model, torch.tensor([[8]]), cache), expected[:, 1:])
    cache.crop(-1)
    plain = adapted_model.unload()
    assert torch.equal(compute(plain, torch.tensor([[8]]), cache), expected[:, 1:])
    assert reasons[-1] is None


def test_training_mode(reasons):
    model = create(hidden_dropout=0.5)
    blocks = model.transformer.encoder.layers
    for module in (blocks[1], blocks[0].self_attention):
        module.training = True
        take_steps(model, fill(model, 5), count=1)
        assert reasons.pop() == "a block is in training mode"
        module.training = False
    model.transformer.training = True
    assert explain(model, reasons) == "the model is in training mode"
    model.eval()
    assert explain(model, reasons) is None


def test_what_else_is_computed(reasons):
    model = create()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in explain(model, reasons, fill(model, 5))
    for name in ("output_hidden_states", "output_attentions"):
        given = {"input_ids": torch.tensor([[7]]), name: True}
        assert explain(model, reasons, **given) == f"{name} is given"
    given = {"input_ids": torch.tensor([[7, 8]])}
    assert explain(model, reasons, **given) is None
    positions = torch.tensor([[5, 7]])
    reason = explain(model, reasons, **given, position_ids=positions)
    assert reason == "the positions are not consecutive"
    reason = explain(model, reasons, **given, is_prompt=True, logits_to_keep=2)
    assert reason == "not all tokens have one role"


def test_masks(reasons):
    model, ids = create(), draw_ids(create(), 6, 2)
    mask = torch.ones(2, 11, dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": mask}
    assert explain(model, reasons, fill(model, 5, 2), **given) is None
    mask[0, :2] = 0  # padding on the left
    assert explain(model, reasons, fill(model, 5, 2), **given) == "tokens are masked"
    given["attention_mask"] = torch.ones(2, 1, 6, 11, dtype=torch.bool)
    assert explain(model, reasons, fill(model, 5, 2), **given) == "tokens are masked"


def test_attention_implementations(reasons):
    model = create()
    AttentionInterface.register("own", eager_attention_forward)
    mask = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    AttentionMaskInterface.register("own", mask)
    for name, reason in (("eager", None), ("own", "the attention is own")):
        model.set_attn_implementation(name)
        assert explain(model, reasons) == reason


def test_gradients(reasons):
    """Where they are enabled, the modules decide what needs one."""
    model, ids = create(), torch.tensor([[7]])
    embeds = torch.randn(1, 1, 64, requires_grad=True)
    model.transformer.requires_grad_(False)
    model(inputs_embeds=embeds, past_key_values=fill(model, 5)).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0
    norm = model.transformer.encoder.layers[0].input_layernorm.weight
    norm.requires_grad_(True)
    model(ids, past_key_values=fill(model, 5)).logits.sum().backward()
    assert reasons == 2 * ["a gradient may be needed"] and norm.grad.abs().sum() > 0
    cache = fill(model, 5)
    first = cache.layers[0]
    first.keys, first.buffers = first.keys.clone().requires_grad_(), None
    logits = compute(model, ids, cache)
    assert reasons[2:] == [None] and not logits.requires_grad


def test_inference_mode(reasons):
    """A cache that was made in it goes on outside."""
    model, ids = create(), draw_ids(create(), 8)
    with torch.inference_mode():
        cache = ChatGLMCache()
        first = model(ids[:, :5], past_key_values=cache).logits
    second = compute(model, ids[:, 5:], cache)
    expected = compute(model, ids, ChatGLMCache())
    assert torch.equal(torch.cat((first, second), dim=1), expected)
    assert reasons == 3 * [None]


def test_other_caches(reasons):
    model, ids = create(), torch.tensor([[5, 6, 7]])
    expected = torch.cat([compute(model, x, own) for own in [ChatGLMCache()] for x in (ids, ids)])
    assert reasons == [None, None]
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        reasons.clear()
        assert_close(torch.cat([compute(model, ids, cache) for _ in range(2)]), expected)
        assert reasons == 2 * [f"the cache is a {type(cache).__name__}"]
    reasons.clear()
    with torch.no_grad():
        assert_close(model(ids, use_cache=False).logits, expected[:1])
    assert reasons == ["the cache is a NoneType"]


def test_cache_after_a_reset(reasons):
    model, ids, cache = create(), draw_ids(create(), 5), ChatGLMCache()
    expected = compute(model, ids, cache)
    cache.reset()
    assert torch.equal(compute(model, ids, cache), expected)
    assert reasons == [None, None]


def test_rows_without_a_token(reasons):
    """`RaggedCache` asks for one in each; C would write beside what such a row has."""
    model = create()
    for empty in (ChatGLMCache(), fill(model, 5)):
        empty.reset()
        reasons.clear()
        take_steps(model, RaggedCache([fill(model, 5), empty]), 2, count=1)
        assert reasons == ["a row of the cache is empty"]


def test_dtypes_that_c_cannot_write(reasons):
    model = create()
    model.transformer.cache_dtype = torch.float64
    assert explain(model, reasons, ChatGLMCache()) == "the cache has torch.float64"


def test_cache_of_another_model(reasons):
    """C checks no bounds."""
    model = create()
    for fields in ({"kv_channels": 8}, {"multi_query_group_num": 4}):
        with pytest.raises(RuntimeError):
            take_steps(model, fill(create(**fields), 5), count=1)
    for batch, size in ((3, 1), (1, 3), (3, 2)):
        with pytest.raises(RuntimeError):
            take_steps(model, fill(model, 5, size), batch, count=1)
    with pytest.raises(RuntimeError):  # rows that are missing
        take_steps(model, RaggedCache([fill(model, 5), fill(model, 5)]), 3, count=1)
    assert reasons == 6 * ["the cache has other sizes"]


class OtherLayer(ChatGLMCacheLayer):
    pass


def test_layers_of_another_type(reasons):
    cache = fill(create(), 5)
    cache.layers[1].__class__ = OtherLayer
    assert explain(create(), reasons, cache) == "a layer of the cache is a OtherLayer"


def test_rows_of_different_dtypes(reasons):
    model = create()
    rows = [fill(model, 5), fill(model, 5, dtype=torch.float16)]
    logits = take_steps(model, RaggedCache(rows), 2, count=1)
    assert reasons[0].startswith("the cache has torch.float")
    assert_close(logits[:1], take_steps(model, fill(model, 5), count=1))


def test_parameters_that_c_cannot_read(reasons):
    for name, problem in (
        ("input_layernorm.weight", "a norm is not plain float32"),
        ("self_attention.query_key_value.bias", "a bias is not plain float32"),
    ):
        for change in (lambda x: x.repeat_interleave(2)[::2], torch.Tensor.double):
            model = create()
            parameter = model.transformer.encoder.layers[1].get_parameter(name)
            parameter.data = change(parameter.data)
            reasons.clear()
            logits = take_steps(model, fill(model, 5), count=1)
            assert reasons == [problem]
            assert_close(logits, take_steps(create(), fill(create(), 5), count=1))
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.weight = nn.Parameter(torch.ones(1))  # shorter than C would read
    assert explain(model, reasons) == "a norm is not plain float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_16_bits(dtype, reasons):
    model = create().to(dtype)
    cache = ChatGLMCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=cache)
        model(torch.tensor([[7]]), past_key_values=cache)
    assert reasons[-1] == "the hidden states are not plain float32"
    model = create(fp32_residual_connection=True).to(dtype)
    for module in model.modules():
        if isinstance(module, modeling_chatglm.RMSNorm):
            module.float()
    with torch.no_grad():
        model.transformer(torch.tensor([[7]]), past_key_values=fill(model, 5))
    assert reasons[-1] == "the rotary embedding is not float32"


def test_compiled_code_calls_the_modules():
    names = (*cpu_layers.ARGUMENTS, "prefix", "output_hidden_states", "output_attentions")
    inputs = dict.fromkeys(names)
    inputs |= {"hidden_states": torch.zeros(1, 1, 64), "rotary": [torch.zeros(1)]}
    find = torch.compile(cpu_layers.find_problem_of_tokens, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert cpu_layers.find_problem_of_tokens(inputs, 0) is None
        assert "torch.compile" in find(inputs, 0)


@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
@torch.no_grad()
def test_prefix(name, reasons):
    weights = {
        key.removeprefix(f"{name}.w."): value
        for key, value in VARIANT_TENSORS.items()
        if key.startswith(f"{name}.w.")
    }
    fields = {"pre_seq_len": 4, "prefix_projection": name == "prefix_proj"}
    model = create_model(weights=weights, **fields).quantize(8)
    logits = take_steps(model, cache := ChatGLMCache())
    assert reasons == ["prefix is given", None, None]
    with one_by_one():
        assert_close(logits, take_steps(model, expected := ChatGLMCache()))
    assert_same_cache(cache, expected)
    assert cache.get_seq_length() == 3 and cache.layers[0].get_seq_length() == 7


# Whole answers


def test_roles(monkeypatch, reasons):
    model, calls = create(), []

    def record(function, *args):
        if function == "compute_layer":
            calls.append(args[-2])
        return call(function, *args)

    call = cpu_backend.call
    monkeypatch.setattr(cpu_backend, "call", record)
    for exact_prefill in (False, True):
        calls.clear()
        model.transformer.exact_prefill = exact_prefill
        model.generate(draw_ids(model, 9), max_new_tokens=3, min_new_tokens=3)
        assert calls == 2 * [exact_prefill] + 4 * [True]
    assert reasons == 6 * [None]


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_generate(bundled, settings, reasons):
    ids = torch.tensor([[64790, 64792, 5, 9, 30, 5, 9]]) % bundled.config.padded_vocab_size
    settings = settings | {"max_new_tokens": 30, "min_new_tokens": 30}
    generated = bundled.generate(ids, **settings)
    if "prompt_lookup_num_tokens" in settings:  # the first candidates come with the prompt
        assert reasons.pop(0) in (None, "not all tokens have one role")
    assert len(reasons) > 5 and set(reasons) == {None}
    with one_by_one():
        assert torch.equal(bundled.generate(ids, **settings), generated)


def test_batch_that_is_padded(bundled, reasons):
    ids = torch.tensor([[3, 3, 5, 9], [64, 5, 9, 30]])
    settings = {"attention_mask": (ids != 3).long(), "max_new_tokens": 10, "min_new_tokens": 10}
    generated = bundled.generate(ids, **settings)
    assert set(reasons) == {"tokens are masked"}
    with one_by_one():
        assert torch.equal(bundled.generate(ids, **settings), generated)


def talk(model, tokenizer):
    history, cache, answers = [], None, []
    for question in ("你好", "tell me a joke"):
        steps = model.stream_chat(
            tokenizer, question, history, cache, do_sample=False, return_past_key_values=True
        )
        for answer, new_history, cache in steps:  # noqa: B007
            pass
        history = new_history
        answers += [answer, cache.input_ids]
    return answers


def test_chat(bundled, tiny_tokenizer, reasons):
    answers = talk(bundled, tiny_tokenizer)
    chosen = bundled.chat(tiny_tokenizer, "你好", do_sample=False)[0]
    assert reasons.count(None) > 20 and chosen == answers[0]
    with one_by_one():
        assert talk(bundled, tiny_tokenizer) == answers


def ask_batcher(model, tokenizer):
    batcher = Batcher(model, tokenizer)
    questions = ["你好", "讲个笑话", "今天工作好累啊", "What is your name?"]
    prompts = [tokenizer.encode(tokenizer.build_prompt(question)) for question in questions]

    async def ask():
        requests = [Request(ids, temperature=0, max_new_tokens=20) for ids in prompts]
        return await asyncio.gather(*[batcher.submit(request).collect() for request in requests])

    try:
        return [chunk.token_ids for chunk in asyncio.run(ask())]
    finally:
        batcher.close()
        batcher.join()


def test_batcher(bundled, tiny_tokenizer, reasons):
    answers = ask_batcher(bundled, tiny_tokenizer)
    assert reasons.count(None) >= 19
    with one_by_one():
        assert ask_batcher(bundled, tiny_tokenizer) == answers


# What goes wrong


class Failing:
    """The C function, without memory from a call on."""

    def __init__(self, function, first):
        self.function, self.first, self.calls = function, first, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args) if self.calls <= self.first else -1


def test_no_memory(monkeypatch, reasons):
    model, library = create(num_layers=3), build_cpu.get_library()[0]
    function = library.chatglm_compute_layer
    for first in range(3):
        cache = fill(model, 5)
        with monkeypatch.context() as patch, pytest.raises(MemoryError, match="compute_layer"):
            patch.setattr(library, "chatglm_compute_layer", Failing(function, first))
            take_steps(model, cache, count=1)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        assert lengths == first * [6] + (3 - first) * [5]
        assert cache.is_consistent(3) == (first == 0)
    assert reasons == 3 * [None]


def chat_twice(model, tokenizer, cache, error):
    """Ask until there is the error, then again with the same cache; return that answer."""
    with pytest.raises(error):
        list(model.stream_chat(tokenizer, "讲个笑话", [], cache, do_sample=False))
    yield
    *_, (answer, _) = model.stream_chat(tokenizer, "讲个笑话", [], cache, do_sample=False)
    assert cache.get_seq_length() > 0, "it was not reset again"
    yield answer


@pytest.mark.parametrize("first", [0, 2, 9, 12])  # of four layers, the prompt's first
def test_chat_recovers(first, monkeypatch, bundled, tiny_tokenizer):
    library = build_cpu.get_library()[0]
    expected = bundled.chat(tiny_tokenizer, "讲个笑话", do_sample=False)[0]
    steps = chat_twice(bundled, tiny_tokenizer, ChatGLMCache(), MemoryError)
    with monkeypatch.context() as patch:
        failing = Failing(library.chatglm_compute_layer, first)
        patch.setattr(library, "chatglm_compute_layer", failing)
        next(steps)
    assert failing.calls == first + 1 and next(steps) == expected


class OwnError(Exception):
    pass


@pytest.mark.parametrize("index", [0, 2, 3])
def test_chat_recovers_from_an_error_within_a_layer(index, bundled, tiny_tokenizer):
    """The modules are called; after it the cache lacks the later layers."""
    expected = bundled.chat(tiny_tokenizer, "讲个笑话", do_sample=False)[0]
    steps = chat_twice(bundled, tiny_tokenizer, ChatGLMCache(), OwnError)

    def fail(*args):
        raise OwnError

    handle = bundled.transformer.encoder.layers[index].mlp.register_forward_hook(fail)
    try:
        next(steps)
    finally:
        handle.remove()
    assert next(steps) == expected


def test_another_thread_may_save_the_model(reasons):
    model = create(8, hidden_size=512, ffn_hidden_size=1024)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = take_steps(model, fill(model, 5), count=40)
    stop, wrong = threading.Event(), []

    def save():
        while not stop.is_set():
            saved = model.state_dict()
            wrong.extend(name for name in state if not torch.equal(saved[name], state[name]))

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(5):
            assert torch.equal(take_steps(model, fill(model, 5), count=40), expected)
    finally:
        stop.set()
        thread.join()
    assert not wrong and reasons == 240 * [None]


def test_changed_weights_are_seen(reasons):
    model, other = create(), create()
    for parameter in other.transformer.encoder.parameters():
        if parameter.ndim == 1:  # norms, biases, scales
            parameter.data *= 1.5
    before = take_steps(model, fill(model, 5))
    model.transformer.encoder.load_state_dict(other.transformer.encoder.state_dict())
    after = take_steps(model, fill(model, 5))
    assert torch.equal(after, take_steps(other, fill(other, 5))) and not torch.equal(after, before)
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)
    assert not torch.equal(take_steps(model, fill(model, 5)), after)
    assert reasons == 12 * [None]
