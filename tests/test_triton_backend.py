"""The Triton kernels: in Triton's interpreter against plain torch, and compiled without a GPU.

The interpreter must be chosen before Triton is imported, so this file runs itself as a program.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory import create_sparse
from quantized_layers import compute_error, create_layer

from chatglm2.quantization import QuantizedLinear

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton", reason="needs Triton: pip install triton")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest output
WAYS = {"int8": (8, None, 200), "int4": (4, None, 200), "g128": (4, 128, 256)}  # and inputs
NUM_ROWS = [1, 8, 40]
KERNELS = ["matvec_kernel", "tile_kernel"]
CASES = list(itertools.product(DTYPES, WAYS, NUM_ROWS))


def compute_kernel_error(dtype: str, way: str, num_rows: int) -> float:
    from chatglm2.kernels.triton_backend import TritonBackend
    from chatglm2.quantization import torch_matmul

    (bits, group_size, in_features), backend = WAYS[way], TritonBackend()
    layer = create_layer(bits, group_size, in_features, 70, dtype=DTYPES[dtype])
    assert backend.find_problem(layer, torch.device("cpu"), DTYPES[dtype]) is None
    x = torch.randn(1, num_rows, in_features).to(DTYPES[dtype])
    y, exact = backend.matmul(x, layer), torch_matmul(x.double(), layer)
    assert y.dtype == x.dtype and y.shape == exact.shape
    return compute_error(y, exact)


def compute_error_behind_2_to_31(name: str) -> float:
    """Compute the first outputs of 17 rows of 2**27."""
    from chatglm2.kernels import triton_backend
    from chatglm2.quantization import torch_matmul

    num_rows, num_outputs = 17, 2**27
    y = create_sparse(2 * num_rows * num_outputs).view(torch.float16).view(num_rows, num_outputs)
    layer, x = create_layer(4, 128, 128, 64, dtype=torch.float16), torch.randn(17, 128).half()
    options = {"GROUP_SIZE": 128, "BITS": 4, "BLOCK_OUT": 64, "BLOCK_IN": 128}
    tensors = x, layer.weight, layer.weight_scale, y
    if name == "matvec_kernel":
        triton_backend.matvec_kernel[num_rows, 1](*tensors, 128, num_outputs, **options)
    else:
        options |= {"BLOCK_ROWS": 32, **triton_backend.get_pieces(torch.float16)}
        triton_backend.tile_kernel[1, 1](*tensors, num_rows, 128, num_outputs, **options)
    return compute_error(y[:, :64], torch_matmul(x.double(), layer))


def compute_errors() -> dict:
    """Return the errors of the kernels, and of a model that uses them."""
    from chatglm2 import ChatGLMForConditionalGeneration

    errors = {str(case): compute_kernel_error(*case) for case in CASES}
    errors |= {name: compute_error_behind_2_to_31(name) for name in KERNELS}
    checkpoint = ROOT / "resources" / "chatglm2-tiny"
    logits = []
    for name in ("triton", "torch"):
        os.environ["CHATGLM_BACKEND"] = name
        model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model.quantize(4)(torch.tensor([[5, 7, 9]])).logits)
    return {**errors, "model": (logits[0] - logits[1]).abs().max().item()}


@pytest.mark.slow  # starts a process
def test_kernels_and_a_model_are_as_plain_torch():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "backend triton (CHATGLM_BACKEND says so)" in run.stderr
    interpreted = json.loads(run.stdout)
    assert interpreted.pop("model") < 1e-3
    assert all(interpreted[name] <= TOLERANCES["float16"] for name in KERNELS)
    assert all(interpreted[str(case)] <= TOLERANCES[case[0]] for case in CASES), interpreted


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, dtype, way, name, tmp_path, monkeypatch):
    """A thread has little on its stack, which is in the GPU's memory."""
    if sys.platform != "linux":
        pytest.skip("Triton's compiler for GPUs is for Linux")
    import triton
    from triton.backends.compiler import GPUTarget

    from chatglm2.kernels import triton_backend

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bits, group_size, _ = WAYS[way]
    constants = {"GROUP_SIZE": group_size or 0, "BITS": bits}
    constants |= {x: getattr(triton_backend, x) for x in ("BLOCK_ROWS", "BLOCK_OUT")}
    constants |= {"BLOCK_IN": triton_backend.count_columns(bits)}
    constants |= triton_backend.get_pieces(DTYPES[dtype])
    kernel = getattr(triton_backend, name)
    constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
    kind = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    types = {"x": kind, "weight": "*i8", "weight_scale": kind, "y": kind}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {x: types.get(x, "i32") for x in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage)[1]) <= 512


def test_layers_that_it_cannot_serve(monkeypatch):
    from chatglm2.kernels import triton_backend

    find_problem, layer = triton_backend.TritonBackend().find_problem, create_layer()
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    small_groups = create_layer(4, 32)
    assert "not 32" in find_problem(small_groups, gpu, torch.float16)
    assert "it needs a GPU" in find_problem(layer, cpu, torch.float32)
    assert "torch.float64" in find_problem(layer, gpu, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "the GPU has 7.5" in find_problem(layer, gpu, torch.float16)

    def fail(x, layer):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(triton_backend, "multiply", fail)
    problem = triton_backend.try_kernels.__wrapped__(4, 128, cpu, torch.float16)
    assert problem == "a trial failed: RuntimeError: Failed to find C compiler."


@pytest.mark.parametrize("sizes", [(4096, 4608), (13696, 4096), (200, 70)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_trial_compiles_the_kernels_of_the_layers(way, sizes, monkeypatch):
    """All that Triton compiles for: the options, and which sizes are multiples of 16."""
    from chatglm2.kernels import triton_backend

    bits, group_size, _ = WAYS[way]
    if group_size and sizes[0] % group_size:
        sizes = 256, sizes[1]
    compiled = set()

    class Recorder:
        def __init__(self, name):
            kernel = getattr(triton_backend, name)
            self.name, self.arguments = name, kernel.arg_names
            self.fixed = kernel.do_not_specialize or []

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options):
            named = dict(zip(self.arguments, args, strict=False))
            tensors = [x.dtype for x in args if isinstance(x, torch.Tensor)]
            numbers = {x: n % 16 == 0 for x, n in named.items() if isinstance(n, int)}
            numbers = {x: is_multiple for x, is_multiple in numbers.items() if x not in self.fixed}
            compiled.add(str((self.name, tensors, numbers, options)))

    for name in KERNELS:
        monkeypatch.setattr(triton_backend, name, Recorder(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    run_trial, gpu = triton_backend.try_kernels.__wrapped__, torch.device("cuda", 0)

    def try_on_the_cpu(bits, group_size, device, *args):
        return run_trial(bits, group_size, torch.device("cpu"), *args)

    monkeypatch.setattr(triton_backend, "try_kernels", try_on_the_cpu)
    layer = QuantizedLinear(*sizes, bits, group_size, dtype=torch.float16)
    backend = triton_backend.TritonBackend()
    assert backend.find_problem(layer, gpu, torch.float16) is None
    tried = set(compiled)
    assert len(tried) == len(KERNELS)
    for num_rows in (1, 2, 9, 16, 17, 32):
        backend.matmul(torch.zeros(num_rows, sizes[0]).half(), layer)
    assert compiled == tried


if __name__ == "__main__":
    print(json.dumps(compute_errors()))
