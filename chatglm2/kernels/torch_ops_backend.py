"""torch's own CPU operators for weights of 8 and 4 bits, which compute in bfloat16.

A row alone takes 1/20 (INT4) to 1/4 (INT8) of the time that plain PyTorch takes in float32. From
about 30 rows on the INT8 operator is slower, so plain PyTorch computes those. Sums are float32 and
are rounded once: the result is within 1 % of the largest output of what the stored weights give in
float32, as in plain PyTorch in bfloat16 (measured on random matrices: 0.4 % for either).

INT8 weights are used as they are stored. INT4 weights are packed at the first use, in an order that
depends on the CPU, and replace the official ones.
"""

from dataclasses import dataclass
from functools import cache

import torch

from chatglm2.quantization import QuantizedLinear, pack_int4, torch_matmul, unpack_int4

from . import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_INT8_ROWS = 32
GROUP_SIZE = 128  # of INT4 with a scale for each row: the operator knows only groups
INT8_COLUMNS = 16  # columns at a time: the INT8 operator reads others past the end
PACKED_ROWS = 1024  # outputs that are packed at a time
BLOCK_ROWS = 64  # outputs that are ordered by themselves: a multiple of the operator's blocks
OPERATORS = {
    8: ["_weight_int8pack_mm"],
    4: ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"],
}


def get_group_size(layer: QuantizedLinear) -> int:
    return layer.group_size or GROUP_SIZE


def pack(levels: torch.Tensor) -> torch.Tensor:
    """Return levels of 0 to 15 in the operator's order: uint8 [out, in / 2] for [out, in]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)


def split_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of 4 bits in the operator's order: [2 * size]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()


@cache
def find_order(num_rows: int, num_columns: int) -> torch.Tensor:
    """Return the place of each level of a block in the operator's order: [rows * columns].

    The block that is packed to find it holds the digits of each level's own index, in base 16.
    """
    index = torch.arange(num_rows * num_columns)
    found = torch.zeros_like(index)
    for shift in range(0, len(index).bit_length(), 4):
        digits = (index >> shift & 15).view(num_rows, num_columns)
        found += split_bytes(pack(digits)).long() << shift
    return torch.empty_like(index).scatter_(0, found, index)


@dataclass
class PackedInt4:
    """An INT4 weight in the operator's order. It replaces the official one.

    Shapes: weight uint8 [out, in / 2]; scale bfloat16 [in / group_size, out, 2], each scale with
    its zero point.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def from_layer(cls, layer: QuantizedLinear) -> "PackedInt4":
        blocks = layer.weight.split(PACKED_ROWS)
        weight = torch.cat([pack(unpack_int4(rows) + 8) for rows in blocks])
        scale = layer.weight_scale.bfloat16().reshape(layer.out_features, -1).T
        scale = scale.expand(layer.in_features // get_group_size(layer), -1)
        return cls(weight, torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous())

    def restore(self) -> torch.Tensor:
        blocks = []
        for packed in self.weight.split(BLOCK_ROWS):
            num_rows, num_columns = len(packed), 2 * packed.shape[1]
            levels = split_bytes(packed)[find_order(num_rows, num_columns)].view(torch.int8) - 8
            blocks.append(pack_int4(levels.view(num_rows, num_columns)))
        return torch.cat(blocks)


class TorchOpsBackend(Backend):
    note = ", in bfloat16"

    def find_problem(self, layer, device, dtype) -> str | None:
        if device.type != "cpu":
            return "it is for CPUs"
        if dtype not in DTYPES:
            return f"it cannot compute in {dtype}"
        missing = [name for name in OPERATORS[layer.bits] if not hasattr(torch.ops.aten, name)]
        if missing:
            return f"this torch has no {missing[0]}"
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            return "the CPU has no vector instructions that torch knows"
        if layer.out_features % 16:
            return f"it needs a multiple of 16 outputs, not {layer.out_features}"
        multiple = get_group_size(layer) if layer.bits == 4 else INT8_COLUMNS
        if layer.in_features % multiple:
            return f"it needs a multiple of {multiple} inputs, not {layer.in_features}"
        return None

    @torch.no_grad()
    def matmul(self, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features).bfloat16().contiguous()
        if layer.bits == 4:
            packed = layer.pack(PackedInt4)
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = multiply(rows, packed.weight, get_group_size(layer), packed.scale)
        elif len(rows) <= MAX_INT8_ROWS:
            scale = layer.weight_scale.bfloat16()
            y = torch.ops.aten._weight_int8pack_mm(rows, layer.weight, scale)
        else:
            return torch_matmul(x, layer)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def prepare(self, layer: QuantizedLinear):
        if layer.bits == 4:
            layer.pack(PackedInt4)
