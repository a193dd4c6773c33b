"""Products on NVIDIA GPUs: quantization.cu makes a float matrix, torch multiplies by it.

As in the original, cpm_kernels starts the kernels. It is optional: `pip install cpm_kernels
"setuptools<81"`. It needs CUDA's libraries where the system finds them (pip's are not found).
`python -m chatglm2.kernels.build_cuda` compiles the kernels.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from chatglm2.quantization import QuantizedLinear

from . import Backend
from .build_cuda import get_kernel_folder

THREADS = 256  # of a CUDA block, which writes one row
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def find_code(folder: Path, capability: tuple[int, int]) -> Path | None:
    """Return the compiled file for a GPU, e.g. sm_80.cubin for capability (8, 6), or None.

    A cubin runs on GPUs of its major version and the same or a later minor version, PTX on all GPUs
    that are not older.
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
        RuntimeError: The kernels were not compiled.
    """
    from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule

    folder = get_kernel_folder()
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
    """x @ W.T; the float W is made again for the gradient of x instead of kept."""

    @staticmethod
    def forward(ctx, x, weight, weight_scale, bits):
        ctx.bits = bits
        ctx.save_for_backward(weight, weight_scale)
        return F.linear(x, extract(weight, weight_scale, bits, x.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ extract(*ctx.saved_tensors, ctx.bits, grad_output.dtype), *3 * (None,)


def try_kernel(bits: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Extract a small matrix, and return what is wrong, or None."""
    stored = torch.tensor([[0x12, -9], [0, -128]], dtype=torch.int8)
    expected = [[18, -9], [0, 256]] if bits == 8 else [[1, 2, -1, 7], [0, 0, 16, 0]]
    try:
        scale = torch.tensor([1, -2], dtype=dtype, device=device)
        found = extract(stored.to(device), scale, bits, dtype).tolist()
    # cpm_kernels raises whatever its import, its libraries and the driver raise: all are reasons
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None if found == expected else f"wrong result of its kernel: {found}"


class CudaBackend(Backend):
    def find_problem(self, layer, device, dtype) -> str | None:
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, and the device is {device}"
        if dtype not in DTYPE_NAMES:
            return f"it has no kernel for {dtype}"
        return try_kernel(layer.bits, device, dtype)

    def matmul(self, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        return ExtractedLinear.apply(x, layer.weight, layer.weight_scale, layer.bits)
