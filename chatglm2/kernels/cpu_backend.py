"""INT8, INT4 and 16-bit weights on a CPU, by the C kernels of cpu.c: exact for every dtype.

Activations become float32, products are summed in float32, and the result is rounded once, to the
dtype of x; those of a prompt are rounded to int8 first, which is faster. A row's result is the
same, bit for bit, whatever other rows there are. The weights of a `QuantizedLinear` are held in the
kernels' order in place of the official one, which `PackedWeight` restores exactly.
"""

import ctypes
import mmap
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from chatglm2.quantization import QuantizedLinear

from .build_cpu import Linear, get_library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 16  # outputs; see cpu.c
HUGE_PAGE = 2 << 20


def find_problem(layer: QuantizedLinear, x_device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why these kernels cannot serve, or None."""
    if x_device.type != "cpu":
        return "it is for CPUs"
    if dtype not in DTYPES:
        return f"it cannot compute in {dtype}"
    if sys.byteorder != "little":
        return "it is for little-endian machines"
    return get_library()[1]


def call(function: str, *args):
    """Call a C function; tensors are passed as their addresses, and the threads are torch's.

    Raises:
        MemoryError: It says so.
    """
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
    if getattr(get_library()[0], f"chatglm_{function}")(*values, torch.get_num_threads()):
        raise MemoryError(f"not enough memory for the C function {function}: free some")


def allocate(size: int) -> torch.Tensor:
    """Return bytes that begin on a page of 2 MB, if the system has such: they are read faster."""
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE
    with suppress(OSError):  # of a system that was built without such pages
        # not the last, incomplete one: what is never written takes no memory
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return tensor[start : start + size]


@dataclass
class PackedWeight:
    """A weight in the order of cpu.c, which gives the formula.

    Shapes: weight uint8 [blocks * steps * 64]; scale float32 [blocks, groups, 16].
    """

    weight: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size  # of the official one
    bits: int

    @classmethod
    def from_layer(cls, layer: QuantizedLinear) -> "PackedWeight":
        official = layer.weight.detach().contiguous()
        num_blocks, num_steps = -(-official.shape[0] // BLOCK), -(-official.shape[1] // 4)
        weight = allocate(num_blocks * num_steps * 4 * BLOCK)
        call("pack", official, weight, *official.shape, layer.bits)
        scale = layer.weight_scale.detach().float().reshape(len(official), -1)
        filled = scale.new_zeros(num_blocks * BLOCK, scale.shape[1])
        filled[: len(official)] = scale
        scale = filled.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
        return cls(weight, scale, official.shape, layer.bits)

    def restore(self) -> torch.Tensor:
        """Return the official bytes."""
        official = torch.empty(self.shape, dtype=torch.int8)
        call("restore", self.weight, official, *self.shape, self.bits)
        return official


def prepare(layer: QuantizedLinear) -> PackedWeight:
    return layer.replace_weight(PackedWeight.from_layer)


def place(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a 16-bit weight in memory that is read fast."""
    return allocate(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)


def release_pages(parameters):
    """Free the pages of the files in which parameters still are; what is read again comes back.

    Linux counts them as the process's memory, though all but the embedding's are not needed. Pages
    that were written to, which a file does not have, are kept.
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


def describe(layer: QuantizedLinear, packed: PackedWeight) -> Linear:
    """Return a layer as C sees it, without its bias; its addresses are those of `packed`."""
    addresses = packed.weight.data_ptr(), packed.scale.data_ptr(), None
    group_size = layer.group_size or layer.in_features
    return Linear(*addresses, layer.in_features, layer.out_features, group_size, layer.bits)


@torch.no_grad()
def matmul(x: torch.Tensor, layer: QuantizedLinear, exact: bool = True) -> torch.Tensor:
    """Return x @ W.T; unless it is to be exact, x is rounded to int8 in groups of 128 columns."""
    packed = prepare(layer)
    rows = x.reshape(-1, layer.in_features).float().contiguous()
    y = rows.new_empty(*x.shape[:-1], layer.out_features)
    if len(rows):
        call("multiply", ctypes.byref(describe(layer, packed)), rows, y, len(rows), exact)
    return y.to(x.dtype)


def prompt_matmul(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    return matmul(x, layer, exact=False)


@torch.no_grad()
def stored_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T for a float16 or bfloat16 weight, exact in float32."""
    weight = weight.contiguous()
    rows = x.reshape(-1, weight.shape[1]).float().contiguous()
    y = rows.new_empty(*x.shape[:-1], len(weight))
    if len(rows):
        sizes = len(rows), weight.shape[1], len(weight)
        call("multiply_stored", weight, rows, y, *sizes, weight.dtype == torch.bfloat16)
    return y.to(x.dtype)


def encode(transformer, inputs: dict, num_prompt_tokens: int) -> torch.Tensor | None:
    """Return the hidden states after the last block if all can be computed at once, or None."""
    from .cpu_layers import fused_step_supported, run_fused_step  # it imports the model

    if fused_step_supported(transformer, inputs, num_prompt_tokens):
        return None
    return run_fused_step(transformer, inputs, is_exact=not num_prompt_tokens)
