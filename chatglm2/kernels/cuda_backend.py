"""The quantized matrix product on NVIDIA GPUs: kernels of quantization.cu, then torch's product.

As in the original, cpm_kernels starts the kernels. It is optional: `pip install cpm_kernels
"setuptools<81"`, and CUDA's libraries where the system finds them (not those of pip).
`python -m chatglm2.kernels.build_cuda` compiles the kernels.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from .build_cuda import get_cache_folder

DEVICE_TYPE = "cuda"
THREADS = 256  # of a block, which makes one row
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def find_code(folder: Path, capability: tuple[int, int]) -> Path | None:
    """Return the compiled file for a GPU, e.g. sm_80.cubin for capability (8, 6).

    A cubin runs on its own and later minor versions; PTX on all that are not older.
    """
    wanted = 10 * capability[0] + capability[1]
    for suffix, oldest in ((".cubin", 10 * capability[0]), (".ptx", 0)):
        archs = {int(file.stem.rpartition("_")[2]): file for file in folder.glob(f"*{suffix}")}
        if fitting := [arch for arch in archs if oldest <= arch <= wanted]:
            return archs[max(fitting)]
    return None


@cache
def load_kernels(capability: tuple[int, int]) -> dict[str, object]:
    """Return the kernels by name, for GPUs of one compute capability.

    Raises:
        RuntimeError: They were not built.
    """
    from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule

    folder = get_cache_folder()
    file = find_code(folder, capability)
    if file is None:
        raise RuntimeError(
            f"no compiled kernels for sm_{capability[0]}{capability[1]} in {folder}: run python -m "
            "chatglm2.kernels.build_cuda"
        )
    module = LazyKernelCModule(file.read_bytes())
    names = [f"int{bits}_to_{dtype}" for bits in (8, 4) for dtype in DTYPE_NAMES.values()]
    return {name: KernelFunction(module, name) for name in names}


def extract(
    weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the float matrix [out, in] that a stored one stands for, in `dtype`."""
    rows, columns = weight.shape[0], weight.shape[1] * 8 // bits
    group_size = columns * rows // weight_scale.numel()
    weight, scale = weight.contiguous(), weight_scale.to(dtype).contiguous()
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, scale, out)]
    sizes = [ctypes.c_int(columns), ctypes.c_int(group_size)]
    with torch.cuda.device(weight.device):
        kernels = load_kernels(torch.cuda.get_device_capability())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        kernel = kernels[f"int{bits}_to_{DTYPE_NAMES[dtype]}"]
        kernel((rows, 1, 1), (THREADS, 1, 1), 0, stream, pointers + sizes)
    return out


class ExtractedLinear(torch.autograd.Function):
    """x @ W.T; the float W is made again for the gradient of x, not kept."""

    @staticmethod
    def forward(ctx, x, weight, weight_scale, bits):
        ctx.bits = bits
        ctx.save_for_backward(weight, weight_scale)
        return F.linear(x, extract(weight, weight_scale, bits, x.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ extract(*ctx.saved_tensors, ctx.bits, grad_output.dtype), *3 * (None,)


def matmul(x: torch.Tensor, layer) -> torch.Tensor:
    """Return x @ W.T for a `QuantizedLinear`, differentiable in x."""
    return ExtractedLinear.apply(x, layer.weight, layer.weight_scale, layer.bits)


def find_problem(layer, x_device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot serve a layer, `None` if it can: a small matrix is tried."""
    if x_device.type != DEVICE_TYPE:
        return f"it needs an NVIDIA GPU, and the device is {x_device}"
    if dtype not in DTYPE_NAMES:
        return f"it has no kernel for {dtype}"
    stored = torch.tensor([[0x12, -9], [0, -128]], dtype=torch.int8)
    expected = [[18, -9], [0, 256]] if layer.bits == 8 else [[1, 2, -1, 7], [0, 0, 16, 0]]
    try:
        scale = torch.tensor([1, -2], dtype=dtype, device=x_device)
        found = extract(stored.to(x_device), scale, layer.bits, dtype).tolist()
    # cpm_kernels raises whatever its import, its libraries and the driver raise: all are reasons
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None if found == expected else f"wrong result of its kernel: {found}"
