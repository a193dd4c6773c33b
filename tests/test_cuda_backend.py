"""The CUDA backend without a GPU: its kernels compiled for the CPU, behind a fake cpm_kernels."""

import ctypes
import itertools
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from quantized_layers import create_layer, each_way

from chatglm2.kernels import cuda_backend
from chatglm2.kernels.build_cuda import SOURCE, get_kernel_folder
from chatglm2.quantization import dequantize, torch_matmul

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(1, 2), (3, 6), (7, 130), (5, 1026)]  # more columns than the threads take in one step
FORMATS = [
    *((8, None, *size) for size in [*SIZES, (3, 1), (4, 261)]),
    *((4, None, *size) for size in SIZES),
    *((4, 128, *size) for size in [(1, 128), (5, 384), (3, 1280)]),
]
CODE = b"compiled kernels"
STREAM = 77
CPU = torch.device("cpu")
BACKEND = cuda_backend.CudaBackend()


@pytest.fixture(scope="session")
def cpu_kernels(tmp_path_factory) -> ctypes.CDLL:
    """quantization.cu, compiled with g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for header in ("cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).touch()
    library = folder / "quantization.so"
    shim = Path(__file__).with_name("cuda_on_cpu.h")
    options = ["-O1", "-Wall", "-Werror", "-std=c++17", "-shared", "-fPIC", f"-I{folder}"]
    sources = ["-include", str(shim), "-x", "c++", str(SOURCE)]
    subprocess.run(["g++", *options, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def launches(cpu_kernels, monkeypatch, tmp_path) -> list:
    """Fake a GPU of compute capability 8.6; what is started on it is listed."""
    started = []

    class LazyKernelCModule:
        def __init__(self, code):
            assert code == CODE

    class KernelFunction:
        def __init__(self, module, name):
            self.name = name

        def __call__(self, grid, block, shared_bytes, stream, params):
            started.append((self.name, grid, block, shared_bytes, stream.value))
            addresses = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
            sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
            cpu_kernels.launch(getattr(cpu_kernels, self.name), *sizes, addresses)

    for name in ("cpm_kernels", "cpm_kernels.kernels", "cpm_kernels.kernels.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    base = sys.modules["cpm_kernels.kernels.base"]
    base.LazyKernelCModule, base.KernelFunction = LazyKernelCModule, KernelFunction
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path))
    get_kernel_folder().mkdir(parents=True)
    (get_kernel_folder() / "sm_80.cubin").write_bytes(CODE)
    cuda_backend.load_kernels.cache_clear()
    yield started
    cuda_backend.load_kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size", "rows", "columns"), FORMATS)
def test_kernels_equal_torch_bit_for_bit(launches, bits, group_size, rows, columns, dtype):
    random = torch.Generator().manual_seed(rows * columns)
    shape = (rows, columns * bits // 8)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=random)
    scale = torch.randn(rows, columns // (group_size or columns), generator=random) * 0.01
    scale.view(-1)[::3] *= 1e-5  # subnormal in float16
    scale.view(-1)[-1] = 0
    stored = weight, (scale if group_size else scale.view(-1)).half()
    found = cuda_backend.extract(*stored, bits, dtype)
    expected = dequantize(*stored, bits, dtype)
    assert found.dtype == dtype and torch.equal(found.view(torch.int8), expected.view(torch.int8))
    name = f"int{bits}_to_{str(dtype).removeprefix('torch.')}"
    assert launches == [(name, (rows, 1, 1), (256, 1, 1), 0, STREAM)]


@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_way
def test_matmul_and_its_gradient_equal_torch(launches, bits, group_size, dtype, stored_dtype):
    layer = create_layer(bits, group_size, 256, 9, dtype=stored_dtype)
    x = torch.randn(2, 3, 256, dtype=dtype)
    results = []
    for matmul in (torch_matmul, BACKEND.matmul):
        leaf = x.clone().requires_grad_()
        y = matmul(leaf, layer)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    assert len(launches) == 2  # forward and backward
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_kernels_are_tried(launches, monkeypatch):
    for bits, dtype in itertools.product((8, 4), DTYPES):
        assert cuda_backend.try_kernel(bits, CPU, dtype) is None
    assert len(launches) == 6
    find_problem, layer = BACKEND.find_problem, create_layer()
    assert "the device is mps" in find_problem(layer, torch.device("mps"), torch.float16)
    assert "torch.float64" in find_problem(layer, torch.device("cuda"), torch.float64)

    def fail(*args):
        raise RuntimeError("CUDA Error: no kernel image\nis available")

    for call, problem in (
        (lambda *args: None, "wrong result of its kernel"),
        (fail, "RuntimeError: CUDA Error: no kernel image is available"),
    ):
        kernel = sys.modules["cpm_kernels.kernels.base"].KernelFunction
        monkeypatch.setattr(kernel, "__call__", call)
        assert cuda_backend.try_kernel(4, CPU, torch.float16).startswith(problem)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    problem = cuda_backend.try_kernel(4, CPU, torch.float16)
    assert "no compiled kernels for sm_61" in problem
    assert problem.endswith(": run python -m chatglm2.kernels.build_cuda")
    cuda_backend.load_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "cpm_kernels.kernels.base", None)
    problem = cuda_backend.try_kernel(4, CPU, torch.float16)
    assert problem.startswith("ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), None),
        ((7, 5), "sm_75.cubin"),
        ((8, 0), "compute_75.ptx"),
        ((8, 9), "sm_86.cubin"),
        ((12, 1), "compute_75.ptx"),
    ],
)
def test_find_code(tmp_path, capability, expected):
    for name in ("sm_75.cubin", "sm_86.cubin", "compute_75.ptx", "sm_90.1234"):
        (tmp_path / name).touch()
    found = cuda_backend.find_code(tmp_path, capability)
    assert (found and found.name) == expected
    assert cuda_backend.find_code(tmp_path / "absent", capability) is None
