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
from quantized_layers import compute_error, create_layer

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton", reason="needs Triton: pip install triton")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest output
WAYS = {"int8": (8, None, 200), "int4": (4, None, 200), "g128": (4, 128, 256)}  # and inputs
NUM_ROWS = [1, 8, 40]
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


def compute_errors() -> dict:
    """Return the errors of the kernels, and of a model that uses them."""
    from chatglm2 import ChatGLMForConditionalGeneration

    errors = {str(case): compute_kernel_error(*case) for case in CASES}
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
    assert all(interpreted[str(case)] <= TOLERANCES[case[0]] for case in CASES), interpreted


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
    from chatglm2.kernels import triton_backend

    find_problem, layer = triton_backend.TritonBackend().find_problem, create_layer()
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert "it needs a GPU" in find_problem(layer, cpu, torch.float32)
    assert "torch.float64" in find_problem(layer, gpu, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "the GPU has 7.5" in find_problem(layer, gpu, torch.float16)

    def fail(x, layer):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(triton_backend, "multiply", fail)
    problem = triton_backend.try_kernels.__wrapped__(4, 128, cpu, torch.float16)
    assert problem == "a trial failed: RuntimeError: Failed to find C compiler."


if __name__ == "__main__":
    print(json.dumps(compute_errors()))
