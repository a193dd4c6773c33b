"""Products with INT8 and INT4 weights in Triton, without ever storing a float weight.

    y[row, out] = sum over c of x[row, c] * level(out, c) * scale[out, c // GROUP_SIZE]

A stored byte holds `8 / BITS` levels, the first in its high bits: column c of a row is part
`c % (8 / BITS)` of byte `c // (8 / BITS)`. With one scale for each row, GROUP_SIZE is 0. Levels are
exact in any float type, sums are float32, and scales multiply the sums.

Tensor cores are used for 16-bit numbers. So in tiles a float32 value is a sum of three bfloat16
pieces, each of which holds the next eight bits of it: no bit is lost.

TRITON_INTERPRET=1, set before the first import of triton, runs this file on a CPU, for tests.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from chatglm2.quantization import QuantizedLinear

from . import Backend

MAX_MATVEC_ROWS = 8  # more rows are computed in tiles, which load each weight once for all of them
BLOCK_BYTES = 64  # of a stored row at a time; their columns share a scale
BLOCK_OUT = 64
BLOCK_ROWS = 32
OLDEST_GPU = (8, 0)  # compute capability
PIECE_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.bfloat16}
NUM_PIECES = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 3}
# The interpreter's dot reads the bits of bfloat16 as integers.
IS_DOT_WIDE = triton.knobs.runtime.interpret


@triton.jit
def find_rows(matrix, row, size):
    """Return the addresses of rows of `size` elements; matrices may have more than 2**31."""
    return matrix + row.to(tl.int64) * size


@triton.jit
def load_levels(weight_rows, byte, is_out, in_bytes, part, BITS: tl.constexpr):
    """Return int32 levels [out, byte] of one part of the bytes: shifted left, the sign comes back.

    For BITS 4, byte 0x1f: part 0 is 0x1f000000 >> 28 = 1, part 1 is 0xf0000000 >> 28 = -1.
    """
    inside = is_out[:, None] & (byte[None, :] < in_bytes)
    stored = tl.load(weight_rows[:, None] + byte[None, :], inside, other=0)
    return (stored.to(tl.int32) << (24 + BITS * part)) >> (32 - BITS)


@triton.jit
def matvec_kernel(
    x, weight, weight_scale, y, in_features, out_features,
    GROUP_SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """y[row, out] = sum over in of x[row, in] * W[out, in]; a program for BLOCK_OUT of one row."""
    PARTS: tl.constexpr = 8 // BITS
    row = tl.program_id(0)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = out < out_features
    x_row = find_rows(x, row, in_features)
    weight_rows = find_rows(weight, out, in_features // PARTS)
    scale_rows = find_rows(weight_scale, out, in_features // GROUP_SIZE if GROUP_SIZE else 1)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        byte = start // PARTS + tl.arange(0, BLOCK_IN // PARTS)
        products = tl.zeros((BLOCK_OUT, BLOCK_IN // PARTS), tl.float32)
        for part in tl.static_range(PARTS):
            column = byte * PARTS + part
            value = tl.load(x_row + column, column < in_features, other=0)
            level = load_levels(weight_rows, byte, is_out, in_features // PARTS, part, BITS)
            products += level.to(tl.float32) * value.to(tl.float32)[None, :]
        group = start // GROUP_SIZE if GROUP_SIZE else 0
        scale = tl.load(scale_rows + group, is_out, other=0).to(tl.float32)
        total += tl.sum(products, 1) * scale
    y_row = find_rows(y, row, out_features)
    tl.store(y_row + out, total.to(y.dtype.element_ty), is_out)


@triton.jit(do_not_specialize=["num_rows"])  # else some numbers would compile another kernel
def tile_kernel(
    x, weight, weight_scale, y, num_rows, in_features, out_features,
    GROUP_SIZE: tl.constexpr, BITS: tl.constexpr,
    PIECE_DTYPE: tl.constexpr, NUM_PIECES: tl.constexpr, IS_DOT_WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """y = x @ W.T for many rows; a program for a tile [BLOCK_ROWS, BLOCK_OUT] of y."""
    PARTS: tl.constexpr = 8 // BITS
    DOT_DTYPE: tl.constexpr = tl.float32 if IS_DOT_WIDE else PIECE_DTYPE
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = row < num_rows, out < out_features
    x_rows = find_rows(x, row, in_features)
    weight_rows = find_rows(weight, out, in_features // PARTS)
    scale_rows = find_rows(weight_scale, out, in_features // GROUP_SIZE if GROUP_SIZE else 1)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        byte = start // PARTS + tl.arange(0, BLOCK_IN // PARTS)
        products = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for part in tl.static_range(PARTS):
            column = byte * PARTS + part
            inside = is_row[:, None] & (column[None, :] < in_features)
            value = tl.load(x_rows[:, None] + column[None, :], inside, other=0)
            level = load_levels(weight_rows, byte, is_out, in_features // PARTS, part, BITS)
            level = tl.trans(level.to(DOT_DTYPE))
            for _ in tl.static_range(NUM_PIECES):
                piece = value.to(PIECE_DTYPE)
                products = tl.dot(piece.to(DOT_DTYPE), level, products, input_precision="ieee")
                value = value.to(tl.float32) - piece.to(tl.float32)
        group = start // GROUP_SIZE if GROUP_SIZE else 0
        scale = tl.load(scale_rows + group, is_out, other=0).to(tl.float32)
        total += products * scale[None, :]
    place = find_rows(y, row, out_features)[:, None] + out[None, :]
    tl.store(place, total.to(y.dtype.element_ty), is_row[:, None] & is_out[None, :])


def count_columns(bits: int) -> int:
    """Return the number of columns that are computed at a time."""
    return BLOCK_BYTES * 8 // bits


def get_pieces(dtype: torch.dtype) -> dict:
    """Return the options of `tile_kernel` for x of a dtype."""
    return {
        "PIECE_DTYPE": PIECE_DTYPES[dtype],
        "NUM_PIECES": NUM_PIECES[dtype],
        "IS_DOT_WIDE": IS_DOT_WIDE,
    }


@torch.no_grad()
def multiply(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    rows = x.reshape(-1, layer.in_features).contiguous()
    y = x.new_empty(len(rows), layer.out_features)
    sizes = layer.in_features, layer.out_features
    options = {
        "GROUP_SIZE": layer.group_size or 0,
        "BITS": layer.bits,
        "BLOCK_OUT": BLOCK_OUT,
        "BLOCK_IN": count_columns(layer.bits),
    }
    num_columns = triton.cdiv(layer.out_features, BLOCK_OUT)
    tensors = rows, layer.weight, layer.weight_scale, y
    with torch.cuda.device_of(x):  # where Triton launches
        if len(rows) <= MAX_MATVEC_ROWS:
            matvec_kernel[len(rows), num_columns](*tensors, *sizes, **options)
        else:
            grid = triton.cdiv(len(rows), BLOCK_ROWS), num_columns
            options |= {"BLOCK_ROWS": BLOCK_ROWS, **get_pieces(x.dtype)}
            tile_kernel[grid](*tensors, len(rows), *sizes, **options)
    return y.unflatten(0, x.shape[:-1])


@cache
def try_kernels(
    bits: int,
    group_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
    in_remainder: int = 0,
    out_remainder: int = 0,
) -> str | None:
    """Run both kernels once, and return what fails (there may be no compiler), or None.

    Args:
        in_remainder: The number of inputs modulo 16: Triton compiles other kernels for multiples.
        out_remainder: The number of outputs modulo 16.
    """
    size = count_columns(bits) + in_remainder
    layer = QuantizedLinear(
        size, BLOCK_OUT + out_remainder, bits, group_size, dtype=dtype, device=device
    )
    layer.weight.zero_()
    layer.weight_scale.zero_()
    try:
        for num_rows in (1, MAX_MATVEC_ROWS + 1):
            x = torch.zeros(num_rows, size, dtype=dtype, device=device)
            multiply(x, layer).sum().item()
    # Triton, the C compiler and the driver raise whatever they raise: all are reasons
    except Exception as error:
        return f"a trial failed: {type(error).__name__}: {error}".splitlines()[0]
    return None


class TritonBackend(Backend):
    def find_problem(self, layer, device, dtype) -> str | None:
        if dtype not in PIECE_DTYPES:
            return f"it cannot compute in {dtype}"
        if (layer.group_size or 0) % (size := count_columns(layer.bits)):
            return f"it needs groups of {size} columns or a multiple, not {layer.group_size}"
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < OLDEST_GPU:
                return "it needs compute capability {}.{}, the GPU has {}.{}".format(
                    *OLDEST_GPU, *capability
                )
        elif device.type != "cuda" and not triton.knobs.runtime.interpret:
            return "it needs a GPU (on a CPU, for tests: TRITON_INTERPRET=1)"
        remainders = layer.in_features % 16, layer.out_features % 16
        return try_kernels(layer.bits, layer.group_size, device, dtype, *remainders)

    def matmul(self, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        return multiply(x, layer)
