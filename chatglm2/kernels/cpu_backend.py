"""INT8, INT4 and 16-bit weights on a CPU, by the C kernels of cpu.c and stored.c.

Activations are converted to float32, and for INT8 and INT4 weights to 16-bit integers with a scale
for each 128 columns. The result is rounded once, to the dtype of x. The result of a row is the
same, bit for bit, whatever other rows there are.
"""

import ctypes
import mmap
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from chatglm2.quantization import GROUP_SIZE, QuantizedLinear

from . import Backend
from .build_cpu import Linear, get_library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (None, GROUP_SIZE)
BLOCK = 16  # outputs; see packing.c
HUGE_PAGE = 2 << 20


def is_readable(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> bool:
    """Whether C, which checks nothing, can read a tensor as an array of this type and shape."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        and tensor.data_ptr() % dtype.itemsize == 0
    )


def get_address(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Return the address for C of a tensor that was not created for it.

    Raises:
        RuntimeError: C cannot read the tensor as an array of this type and shape.
    """
    if not is_readable(tensor, dtype, *shape):
        raise RuntimeError(
            f"the CPU kernels got a tensor of {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}: give a contiguous one of {dtype} {list(shape)} on cpu"
        )
    return tensor.data_ptr()


def make_readable(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a dtype, contiguous and aligned, copied only if necessary."""
    tensor = tensor.detach().to(dtype).contiguous()
    return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor


def call(function: str, *args):
    """Call a C function with torch's number of threads.

    Raises:
        MemoryError: The function could not allocate memory.
    """
    if getattr(get_library()[0], f"chatglm_{function}")(*args, torch.get_num_threads()):
        raise MemoryError(f"not enough memory for the C function {function}: free some")


def allocate(size: int) -> torch.Tensor:
    """Return bytes in pages of 2 MB if the system has them, because those are read faster."""
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE
    with suppress(OSError):  # Linux may be built without large pages
        # Not for the last, incomplete page: it would take memory that is never written.
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return tensor[start : start + size]


@dataclass
class PackedWeight:
    """A weight in the order of packing.c. It replaces the official one, which it restores exactly.

    Attributes:
        shape: The shape of the official weight.

    Shapes: weight uint8 [blocks * steps * 64]; scale float32 [blocks, groups, 16].
    """

    weight: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size
    bits: int

    @classmethod
    def from_layer(cls, layer: QuantizedLinear) -> "PackedWeight":
        shape = torch.Size((layer.out_features, layer.in_features * layer.bits // 8))
        official = make_readable(layer.weight, layer.weight.dtype)
        num_blocks, num_steps = -(-shape[0] // BLOCK), -(-shape[1] // 4)
        weight = allocate(num_blocks * num_steps * 4 * BLOCK)
        addresses = get_address(official, torch.int8, *shape), weight.data_ptr()
        call("pack", *addresses, *shape, layer.bits)
        num_groups = layer.in_features // (layer.group_size or layer.in_features)
        filled = torch.zeros(num_blocks * BLOCK, num_groups, dtype=torch.float32, device="cpu")
        official = make_readable(layer.weight_scale.reshape(shape[0], -1), torch.float32)
        get_address(official, torch.float32, shape[0], num_groups)
        filled[: shape[0]] = official
        scale = filled.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
        return cls(weight, scale, shape, layer.bits)

    def restore(self) -> torch.Tensor:
        official = torch.empty(self.shape, dtype=torch.int8, device="cpu")
        call("restore", self.weight.data_ptr(), official.data_ptr(), *self.shape, self.bits)
        return official


def describe(layer: QuantizedLinear, packed: PackedWeight) -> Linear:
    """Return the C structure of a layer without its bias. It does not keep `packed` alive."""
    addresses = packed.weight.data_ptr(), packed.scale.data_ptr(), None
    group_size = layer.group_size or layer.in_features
    return Linear(*addresses, layer.in_features, layer.out_features, group_size, layer.bits)


@torch.no_grad()
def multiply(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """Return x @ W.T; x is rounded to 16 bits in groups of 128 columns."""
    packed = layer.pack(PackedWeight)
    rows = make_readable(x.reshape(-1, x.shape[-1]), torch.float32)
    y = rows.new_empty(*x.shape[:-1], layer.out_features)
    if len(rows):
        address = get_address(rows, torch.float32, len(rows), layer.in_features)
        linear = ctypes.byref(describe(layer, packed))
        call("multiply", linear, address, y.data_ptr(), len(rows))
    return y.to(x.dtype)


class CPUBackend(Backend):
    def find_problem(self, layer, device, dtype) -> str | None:
        if device.type != "cpu":
            return "it is for CPUs"
        if dtype not in DTYPES:
            return f"it cannot compute in {dtype}"
        if layer.group_size not in GROUP_SIZES:
            return f"it needs a group_size of {GROUP_SIZE}, not {layer.group_size}"
        if sys.byteorder != "little":
            return "it is for little-endian machines"
        return get_library()[1]

    def matmul(self, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        return multiply(x, layer)

    @torch.no_grad()
    def stored_matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight, in_features = make_readable(weight, weight.dtype), weight.shape[1]
        rows = make_readable(x.reshape(-1, x.shape[-1]), torch.float32)
        y = rows.new_empty(*x.shape[:-1], len(weight))
        if len(rows):
            is_bfloat16 = weight.dtype == torch.bfloat16
            dtype = torch.bfloat16 if is_bfloat16 else torch.float16
            addresses = (
                get_address(weight, dtype, *weight.shape),
                get_address(rows, torch.float32, len(rows), in_features),
            )
            sizes = len(rows), in_features, len(weight)
            call("multiply_stored", *addresses, y.data_ptr(), *sizes, is_bfloat16)
        return y.to(x.dtype)

    def prepare(self, layer: QuantizedLinear):
        layer.pack(PackedWeight)

    def place(self, weight: torch.Tensor) -> torch.Tensor:
        return allocate(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)

    def release_pages(self, parameters):
        """Free the memory of the mapped weight files; a page that is read again is loaded again.

        Linux counts these pages as the process's memory, though after packing only the embedding is
        read from them. Pages that were written to differ from the file and are kept.
        """
        smaps = Path("/proc/self/smaps")
        if not smaps.exists():
            return
        addresses = [p.data_ptr() for p in parameters if p.device.type == "cpu"]
        for mapping in re.split(r"\n(?=[0-9a-f]+-)", smaps.read_text(errors="replace")):
            ends, _, _, _, inode = mapping.split(maxsplit=5)[:5]
            begin, end = (int(x, 16) for x in ends.split("-"))
            is_clean = int(inode) and re.search(r"\nAnonymous: +0 kB", mapping)
            if is_clean and any(begin <= address < end for address in addresses):
                libc = ctypes.CDLL(None)
                libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
                libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)

    def encode(self, transformer, inputs: dict) -> torch.Tensor | None:
        from .cpu_layers import can_compute_layers, compute_layers  # which import the model

        if not can_compute_layers(transformer, inputs):
            return None
        return compute_layers(transformer, inputs)
