"""torch's own CPU operators for weights of 8 and 4 bits; activations in bfloat16.

They are used for few rows: there they take 1/100 (INT4) to 1/8 (INT8) of the time of plain PyTorch.
From about 50 rows on they are slower or hardly faster, so plain PyTorch computes those. Sums are
float32 and are rounded once: the result is within 1 % of the largest output of what the stored
weights give in float32, as in plain PyTorch (measured on random matrices: 0.4 % for either).

INT8 weights are used as they are stored. INT4 weights are packed at the first use, in an order that
depends on the CPU and cannot be undone, so the packed copy is held beside the weight.
"""

from dataclasses import dataclass

import torch

from chatglm2.quantization import QuantizedLinear, torch_matmul, unpack_int4

from . import Backend

MAX_ROWS = 32
GROUP_SIZE = 128  # of INT4 with a scale for each row: the operator knows only groups
INT8_COLUMNS = 16  # columns at a time: the INT8 operator reads others past the end
PACKED_ROWS = 1024  # rows that are unpacked at a time, a multiple of the operator's blocks
OPERATORS = {
    8: ["_weight_int8pack_mm"],
    4: ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"],
}


def get_group_size(layer: QuantizedLinear) -> int:
    return layer.group_size or GROUP_SIZE


@dataclass
class PackedInt4:
    """An INT4 weight in the operator's order.

    Shapes: weight uint8 [out, in / 2]; scale bfloat16 [in / group_size, out, 2], each scale with
    its zero point.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def from_layer(cls, layer: QuantizedLinear) -> "PackedInt4":
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        blocks = layer.weight.split(PACKED_ROWS)
        weight = torch.cat([convert(unpack_int4(rows).int() + 8, 1) for rows in blocks])
        scale = layer.weight_scale.bfloat16().reshape(layer.out_features, -1).T
        scale = scale.expand(layer.in_features // get_group_size(layer), -1)
        return cls(weight, torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous())


class TorchOpsBackend(Backend):
    def find_problem(self, layer, device, dtype) -> str | None:
        if device.type != "cpu":
            return "it is for CPUs"
        if dtype != torch.bfloat16:
            return "it needs bfloat16"
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
        rows = x.reshape(-1, layer.in_features).contiguous()
        if len(rows) > MAX_ROWS:
            return torch_matmul(x, layer)
        if layer.bits == 8:
            scale = layer.weight_scale.bfloat16()
            y = torch.ops.aten._weight_int8pack_mm(rows, layer.weight, scale)
        else:
            packed = layer.pack(PackedInt4)
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = multiply(rows, packed.weight, get_group_size(layer), packed.scale)
        return y.unflatten(0, x.shape[:-1])
