"""The C kernels against plain torch, for each set of instructions; and who holds the weight."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import require_library
from memory import create_sparse
from quantized_layers import create_exact_layer, create_layer, each_way

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm2.kernels import cpu_backend
from chatglm2.kernels.cpu_backend import CPUBackend, PackedWeight
from chatglm2.quantization import (
    QuantizedLinear,
    StoredLinear,
    dequantize,
    torch_matmul,
    unpack_int4,
)

pytestmark = pytest.mark.usefixtures("need_library")
CPU = torch.device("cpu")
BACKEND = CPUBackend()
matmul, stored_matmul = BACKEND.matmul, BACKEND.stored_matmul
SIZES = [(384, 80), (2, 1), (6, 5), (130, 33), (1000, 100), (256, 17), (1088, 40)]  # in, out
SIZES.append((64, 1160))  # enough outputs for the largest units of AMX
LAYERS = [(bits, None, *sizes) for bits in (8, 4) for sizes in SIZES]
LAYERS += [(4, 128, 384, 80), (4, 128, 256, 17), (8, None, 7, 20), (8, None, 131, 33)]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def compute_error(y, expected) -> float:
    return ((y - expected).norm() / expected.norm()).item()


@each_layer
def test_order_is_that_of_the_formula_and_is_undone(layer):
    bits, _, in_features, out_features = layer
    layer = create_layer(*layer)
    official = layer.weight.clone()
    levels = unpack_int4(official) if bits == 4 else official
    packed = PackedWeight.from_layer(layer)
    columns, step = 32 // bits, torch.arange(in_features) // (32 // bits)
    num_steps = -(-in_features // columns)
    for out in range(out_features):
        block, lane = divmod(out, 16)
        byte = ((block * num_steps + step) * 16 + lane) * 4 + torch.arange(in_features) % 4
        stored = packed.weight[byte].int()
        if bits == 4:
            is_low = torch.arange(in_features) % 8 < 4
            stored = torch.where(is_low, stored & 15, stored >> 4)
        assert torch.equal(stored - (128 if bits == 8 else 8), levels[out].int())
        scale = layer.weight_scale[out].reshape(-1)
        assert torch.equal(packed.scale[block, :, lane], scale)
    assert torch.equal(packed.restore(), official)


# Products


@each_layer
def test_product_is_that_of_plain_torch(isa, layer):
    layer = create_layer(*layer)
    x = torch.randn(3, 7, layer.in_features)
    expected = torch_matmul(x.double(), layer)
    y = matmul(x, layer)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert compute_error(y, expected) < 5e-5


@each_layer
def test_row_is_the_same_alone_and_in_a_batch(isa, layer):
    layer = create_layer(*layer)
    x = torch.randn(277, layer.in_features)
    expected = matmul(x, layer)
    for num_rows in (1, 2, 3, 5, 8, 16, 21):
        for first in (2, 250):
            rows = slice(first, first + num_rows)
            assert torch.equal(matmul(x[rows], layer), expected[rows])


@each_way
def test_every_level_and_negative_scales(isa, bits, group_size):
    layer = create_exact_layer(bits, group_size)
    expected = torch_matmul(torch.eye(256), layer)
    torch.testing.assert_close(matmul(torch.eye(256), layer), expected, rtol=1e-6, atol=0)


@each_way
def test_formula(isa, bits, group_size):
    layer = create_layer(bits, group_size, in_features=384)
    x = torch.randn(5, 384) * torch.logspace(-30, 30, 5)[:, None]
    x[4, 128:256] = 0
    groups = x.unflatten(1, (3, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 32639
    rounded = (groups * (1 / scale)).nan_to_num().round().double() * scale.double()
    expected = torch_matmul(rounded.flatten(1), layer)
    for y, row in zip(matmul(x, layer).double(), expected, strict=True):
        assert compute_error(y, row) < 1e-5


@pytest.mark.parametrize("factor", [1, 20, 1000])
@each_way
def test_products_are_more_exact_than_those_of_float16(isa, bits, group_size, factor):
    """Also with large columns, though the others of their group share the scale."""
    torch.manual_seed(0)
    layer = create_layer(bits, group_size, 1024, 256)
    x = torch.randn(32, 1024)
    x[:, ::100] *= factor
    weight = dequantize(layer.weight, layer.weight_scale, bits, torch.float64)
    expected = x.double() @ weight.T
    error = (matmul(x, layer) - expected).norm()
    float16 = (x.half().double() @ weight.half().double().T).half()  # sums without any error
    assert 2 * error < (float16 - expected).norm()


def test_nans_stay_in_their_row(isa):
    layer, x = create_layer(4, 128, 512, 200), torch.randn(9, 512)
    expected = matmul(x, layer)
    x[1, 5] = float("nan")
    x[2, 300] = float("inf")
    x[3] = 1e30
    y = matmul(x, layer)
    assert y[1:3].isnan().all() and torch.equal(y[[0, *range(4, 9)]], expected[[0, *range(4, 9)]])


def test_activations_of_extreme_sizes(isa):
    layer = create_layer(8, None, in_features=256)
    x = torch.zeros(3, 256)
    x[1] = 1.4e-45
    x[2, :128] = 2e-43
    assert (matmul(x, layer).abs() < 1e-37).all()
    # Sums of the largest levels and activations of one sign do not overflow.
    layer = QuantizedLinear(512, 32, 8)
    layer.weight.data = torch.full((32, 512), -128, dtype=torch.int8)
    layer.weight.data[16:] = 127
    layer.weight_scale.data = torch.ones(32)
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 512)
    expected = torch_matmul(x, layer)
    torch.testing.assert_close(matmul(x, layer), expected, rtol=1e-6, atol=0)


WITHOUT_PERMISSION = """
import ctypes


class SignalStack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


memory = ctypes.create_string_buffer(8192)
stack = SignalStack(ctypes.addressof(memory), 0, 8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0

import torch
from quantized_layers import create_layer
from chatglm2.kernels.build_cpu import get_library
from chatglm2.kernels.cpu_backend import multiply

y = multiply(torch.arange(9 * 384.0).view(9, 384), create_layer(4, None))
print(get_library()[0].chatglm_isa().decode(), y.view(torch.int32).sum().item())
"""


@on_linux
def test_amx_is_not_used_without_permission():
    """Linux refuses it if a thread has a stack for signals that is too small for the registers."""
    if require_library() != "amx":
        pytest.skip("this CPU lacks amx instructions")
    command = [sys.executable, "-c", WITHOUT_PERMISSION]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CHATGLM_CPU_ISA": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    y = matmul(torch.arange(9 * 384.0).view(9, 384), create_layer(4, None))
    assert run.stdout == f"avx512 {y.view(torch.int32).sum().item()}\n", run.stderr


@each_dtype
def test_other_dtypes_are_rounded_once(dtype):
    layer = create_layer(4, None)
    x = torch.randn(2, 3, 384).to(dtype)
    assert torch.equal(matmul(x, layer), matmul(x.float(), layer).to(dtype))
    assert matmul(x[:0], layer).shape == (0, 3, 80)


@pytest.mark.slow  # reads 2 GB of zeros
@each_way
def test_weights_of_more_than_2_to_31_bytes(bits, group_size):
    """The last outputs of a packed weight; all others are zero, which is the lowest level."""
    in_features, out_features = 2**15, 2**16 * 8 // bits + 16
    layer = create_layer(bits, group_size, in_features, 16)
    last, steps = PackedWeight.from_layer(layer), in_features * bits // 32
    weight = create_sparse(out_features // 16 * steps * 64)
    weight[-len(last.weight) :] = last.weight
    scale = torch.zeros(out_features // 16, *last.scale.shape[1:])
    scale[-1] = last.scale[0]
    large = QuantizedLinear(in_features, out_features, bits, group_size, device="meta")
    large.packed = PackedWeight(weight, scale, large.weight.shape, bits)
    x = torch.randn(1, in_features)
    assert torch.equal(matmul(x, large)[:, -16:], matmul(x, layer))


@each_dtype
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 40), (100, 77), (6, 1)])
def test_stored_weights(isa, dtype, in_features, out_features):
    weight = torch.randn(out_features, in_features).to(dtype)
    x = torch.randn(21, in_features)
    expected = stored_matmul(x, weight)
    assert compute_error(expected, F.linear(x.double(), weight.double())) < 1e-6
    for num_rows in (1, 2, 3, 5, 8, 16):
        assert torch.equal(stored_matmul(x[2 : 2 + num_rows], weight), expected[2 : 2 + num_rows])
    rounded = stored_matmul(x.to(dtype), weight)
    assert torch.equal(rounded, stored_matmul(x.to(dtype).float(), weight).to(dtype))


@each_dtype
def test_every_stored_number(isa, dtype):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    y = stored_matmul(torch.ones(1, 1), weight)[0]
    torch.testing.assert_close(y, weight.float()[:, 0], rtol=0, atol=0, equal_nan=True)


def change_default_device(layer):
    with torch.device("meta"):
        return layer(torch.ones(1, layer.in_features, device="cpu")), layer.state_dict()


def test_default_device_of_torch_is_not_that_of_the_kernels():
    layer, expected = create_layer(4, 128), create_layer(4, 128).state_dict()
    y, state = change_default_device(layer)
    assert torch.equal(y, layer(torch.ones(1, 384)))
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda x: x.to(torch.int16)),
        ("weight", lambda x: x.to("meta")),
        ("weight", lambda x: x[:, :-1]),
        ("weight", lambda x: x[:-1]),
        ("weight_scale", lambda x: x.to("meta")),
        ("weight_scale", lambda x: x[:, :-1]),
    ],
)
def test_weights_that_c_cannot_read(name, change):
    layer = create_layer(4, 128)
    changed = change(getattr(layer, name).data)
    setattr(layer, name, torch.nn.Parameter(changed, requires_grad=False))
    with pytest.raises(RuntimeError):
        matmul(torch.ones(1, 384), layer)


def test_inputs_that_c_cannot_read():
    layer, stored = create_layer(4, 128), torch.ones(8, 384)
    for x in (torch.ones(2, 192), torch.ones(2, 768)):  # as many numbers as whole rows have
        with pytest.raises(RuntimeError, match=r"give a contiguous one of .* \[2, 384\] on cpu"):
            matmul(x, layer)
        with pytest.raises(RuntimeError):
            stored_matmul(x, stored.half())
    for weight in (stored.short(), stored.half().to("meta")):
        with pytest.raises(RuntimeError):
            stored_matmul(torch.ones(1, 384), weight)


def test_tensors_at_odd_addresses():
    def misalign(x):
        memory = torch.empty(x.nbytes + 1, dtype=torch.uint8)[1:]
        memory = torch.frombuffer(memory.numpy(), dtype=x.dtype).view(x.shape)
        return memory.copy_(x)

    layer, x, weight = create_layer(4, 128), torch.randn(3, 384), torch.randn(9, 384).half()
    assert misalign(x).data_ptr() % 4
    assert torch.equal(matmul(misalign(x), layer), matmul(x, layer))
    assert torch.equal(stored_matmul(x, misalign(weight)), stored_matmul(x, weight))


@on_linux
def test_one_openmp_runtime():
    """The kernels' threads are torch's own, not a second set."""
    maps = Path("/proc/self/maps").read_text().split()
    names = "libgomp.so", "libomp.so", "libiomp5.so"  # other packages bring some of other names
    assert len({path for path in maps if Path(path).name.startswith(names)}) == 1


# Who holds the weight


@each_way
def test_packed_weight_stands_for_the_official_one(bits, group_size):
    layer, x = create_layer(bits, group_size), torch.randn(2, 384)
    official = {name: value.clone() for name, value in layer.state_dict().items()}

    expected = layer(x)
    for save in (
        lambda: layer.state_dict(),
        lambda: {"weight": layer.weight, "weight_scale": layer.weight_scale},
        lambda: copy.deepcopy(layer).state_dict(),
        lambda: pickle.loads(pickle.dumps(layer)).state_dict(),
        lambda: layer.double().float().state_dict(),
    ):
        assert torch.equal(layer(x), expected)
        assert dict(layer.named_parameters())["weight"].is_meta, "a second copy"
        found = save()
        assert found.keys() == official.keys()
        assert all(torch.equal(found[name], official[name]) for name in official)
    assert layer.to("meta").weight.is_meta


def test_changed_weight_is_packed_anew():
    layer, other, x = create_layer(4, None), create_layer(4, None, seed=1), torch.randn(2, 384)
    first, expected = layer(x), other(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)
    layer.weight.data = create_layer(4, None).weight.data
    layer.weight_scale.data = create_layer(4, None).weight_scale.data
    assert torch.equal(layer(x), first)
    layer.weight = other.weight
    mixed = layer(x)
    layer.weight_scale = other.weight_scale
    assert torch.equal(layer(x), expected) and not torch.equal(mixed, expected)


def test_threads_share_a_layer():
    """One computes while another saves: neither may see the state between."""
    layer, x = create_layer(8, None, 1024, 1024), torch.randn(1, 1024)
    official, expected = layer.weight.clone(), layer(x)

    works = (
        lambda _: torch.equal(layer(x), expected),
        lambda _: torch.equal(layer.state_dict()["weight"], official),
        lambda _: torch.equal(layer.weight, official),
        lambda _: torch.equal(layer(x), expected),
    )
    with ThreadPoolExecutor(6) as pool:
        outcomes = [pool.map(work, range(100)) for work in works]
        assert all(all(outcome) for outcome in outcomes)


def test_gradients_and_products_in_turn():
    layer, x = create_layer(4, 128), torch.randn(2, 384)
    with torch.inference_mode():
        y = layer(x)
        layer.state_dict()
    with_grad = layer(x.clone().requires_grad_())
    with_grad.sum().backward()
    torch.testing.assert_close(with_grad, y, rtol=0, atol=1e-4 * y.abs().max())
    assert torch.equal(layer(x), y)


def test_output_layer_is_served():
    layer, quantized = StoredLinear(torch.nn.Linear(64, 50, bias=False)), create_layer(4, None)
    quantized(torch.ones(1, 384))
    layer.backend = quantized.backend
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), stored_matmul(x, layer.weight))
    assert layer(x.requires_grad_()).requires_grad
    assert not layer.requires_grad_(True)(torch.ones(1, 64)).is_leaf


MEASURE = """
import sys
import torch
from memory import PeakMemory, read_memory
from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.quantization import prepare_layers

torch.ones(64, 64) @ torch.ones(64, 64)
start = read_memory("RssAnon")
with PeakMemory() as memory:
    model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1]).float()
    prepare_layers(model)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, min_new_tokens=2)
print(memory.peak - start)
"""


@pytest.mark.slow  # starts a process that loads a model
@on_linux
def test_one_copy_of_the_weights_in_memory(tmp_path):
    config = ChatGLMConfig(
        num_layers=8, hidden_size=1024, ffn_hidden_size=4096, kv_channels=128,
        num_attention_heads=8, multi_query_group_num=2, padded_vocab_size=512,
        quantization_bit=8, torch_dtype="float16",
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config, empty_init=False).half()
    weights = [p for p in model.parameters() if p.dtype == torch.int8]
    size = sum(p.numel() for p in weights)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert run.returncode == 0, run.stderr
    peak, largest = int(run.stdout), max(p.numel() for p in weights)
    # beside the weights: one on its way, modules imported late, activations
    assert size * 0.9 < peak < size + largest + 40e6 < 1.5 * size


def test_layers_that_it_cannot_serve(monkeypatch):
    find_problem, layer = BACKEND.find_problem, create_layer(4, None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert find_problem(layer, CPU, dtype) is None
    assert find_problem(layer, CPU, torch.float64)
    assert find_problem(layer, torch.device("mps"), torch.float32)
    assert "not 64" in find_problem(create_layer(4, 64), CPU, torch.float32)
    monkeypatch.setattr(cpu_backend, "get_library", lambda: (None, "no C compiler"))
    assert find_problem(layer, CPU, torch.float32) == "no C compiler"


@on_linux
@pytest.mark.parametrize("is_changed", [False, True])
def test_pages_of_a_mapped_file_are_released_unless_changed(tmp_path, is_changed):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 4096)  # 1 MB
    weight = torch.from_file(str(file), shared=False, size=1 << 20, dtype=torch.uint8)
    if is_changed:
        weight[5000] = 77
    expected = weight.clone()  # reads every page

    def count_resident() -> int:
        smaps = Path("/proc/self/smaps").read_text()
        return int(smaps.partition(str(file))[2].partition("Rss:")[2].split()[0])

    assert count_resident() == 1024
    BACKEND.release_pages([torch.zeros(3), weight, torch.empty(2, device="meta")])
    assert count_resident() == (1024 if is_changed else 0)
    assert torch.equal(weight, expected)
