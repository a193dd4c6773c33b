"""The Triton kernels: in Triton's interpreter against plain torch, and compiled without a GPU.

The interpreter must be chosen before Triton is imported, so this file runs itself as a program.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton", reason="needs Triton: pip install triton")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest output
WAYS = {"int8": (8, None, 200), "int4": (4, None, 200), "g128": (4, 128, 256)}  # and inputs
NUM_ROWS = [1, 8, 40]
CASES = list(itertools.product(DTYPES, WAYS, NUM_ROWS))


def compute_error(dtype: str, way: str, num_rows: int) -> float:
    """Return the largest error of the kernels; 1 is the largest output."""
    from chatglm2.kernels.triton_backend import TritonBackend
    from chatglm2.quantization import QuantizedLinear, torch_matmul

    backend = TritonBackend()
    bits, group_size, in_features = WAYS[way]
    layer = QuantizedLinear(in_features, 70, bits, group_size)
    weight = torch.randn(70, in_features, generator=torch.manual_seed(0)).to(DTYPES[dtype])
    layer.weight.data, layer.weight_scale.data = layer.quantize(weight)
    assert backend.find_problem(layer, torch.device("cpu"), weight.dtype) is None
    x = torch.randn(1, num_rows, in_features).to(weight.dtype)
    y, exact = backend.matmul(x, layer), torch_matmul(x.float(), layer)
    assert y.dtype == x.dtype and y.shape == exact.shape
    return ((y.float() - exact).abs().max() / exact.abs().max()).item()


def compute_errors() -> dict:
    """Return all errors, the logits' with a model that uses the kernels, and what was logged."""
    from chatglm2 import ChatGLMForConditionalGeneration

    errors = {str(case): compute_error(*case) for case in CASES}
    checkpoint = ROOT / "resources" / "chatglm2-tiny"
    logits = {}
    for name in ("triton", "torch"):
        os.environ["CHATGLM_BACKEND"] = name
        model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            logits[name] = model.quantize(4)(torch.tensor([[5, 7, 9]])).logits
    return {**errors, "model": (logits["triton"] - logits["torch"]).abs().max().item()}


@pytest.fixture(scope="module")
def interpreted():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "backend triton (CHATGLM_BACKEND says so)" in run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_as_plain_torch(interpreted, case):
    assert interpreted[str(case)] <= TOLERANCES[case[0]]


@pytest.mark.slow
def test_model(interpreted):
    assert interpreted["model"] < 1e-3


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("name", ["matvec_kernel", "tile_kernel"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, way, name, tmp_path, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("Triton's compiler for GPUs is for Linux")
    import triton
    from triton.backends.compiler import GPUTarget

    from chatglm2.kernels import triton_backend

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bits, group_size, _ = WAYS[way]
    constants = {"GROUP_SIZE": group_size or 4096, "BITS": bits}
    constants |= {x: getattr(triton_backend, x) for x in ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN")}
    constants |= {"DOT_DTYPE": triton.language.bfloat16}
    kernel = getattr(triton_backend, name)
    constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
    types = {"x": "*bf16", "weight": "*i8", "weight_scale": "*bf16", "y": "*bf16"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {x: types.get(x, "i32") for x in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0


def test_layers_that_it_cannot_serve(monkeypatch):
    from chatglm2.kernels.triton_backend import TritonBackend
    from chatglm2.quantization import QuantizedLinear

    find_problem, layer = TritonBackend().find_problem, QuantizedLinear(128, 64, 4)
    gpu = torch.device("cuda", 0)
    assert "it needs a GPU" in find_problem(layer, torch.device("cpu"), torch.float32)
    assert "torch.float64" in find_problem(layer, gpu, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "the GPU has 7.5" in find_problem(layer, gpu, torch.float16)


def test_failing_kernels_are_a_reason(monkeypatch):
    from chatglm2.kernels import triton_backend

    def fail(x, layer):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(triton_backend, "multiply", fail)
    problem = triton_backend.try_kernels.__wrapped__(4, 128, torch.device("cpu"), torch.float16)
    assert problem == "a trial failed: RuntimeError: Failed to find C compiler."


if __name__ == "__main__":
    print(json.dumps(compute_errors()))
