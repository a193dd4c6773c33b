"""torch's own CPU operators for weights of 8 and 4 bits; activations in bfloat16.

For few rows: there they take 1/100 (INT4) to 1/8 (INT8) of plain torch's time, from about 50 rows
on they are slower or hardly faster, so those go to plain torch. They add up in float32, and round
once: the result is within 1 % of the largest output of what the stored weights give in float32, as
plain torch's is (measured on random matrices: 0.4 % for either).

INT8 is used as it is stored. INT4 is packed anew, in the order that this CPU wants, at the first
use; that copy is as large as the weight and is held beside it.
"""

import torch

from chatglm2.quantization import QuantizedLinear, torch_matmul, unpack_int4

MAX_ROWS = 32
GROUP_SIZE = 128  # of INT4 with a scale for each row: the operator knows only groups
PACKED_ROWS = 1024  # as many are unpacked at a time; a multiple of the operator's blocks
OPERATORS = {
    8: ["_weight_int8pack_mm"],
    4: ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"],
}


def find_problem(layer: QuantizedLinear, x_device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why these operators cannot serve, or None."""
    if x_device.type != "cpu":
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
    group_size = layer.group_size or GROUP_SIZE
    if layer.bits == 4 and layer.in_features % group_size:
        return f"it needs a multiple of {group_size} inputs, not {layer.in_features}"
    return None


def pack(layer: QuantizedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an INT4 weight in the operator's order, and its scales with their zero points.

    Shapes: uint8 [out, in / 2]; bfloat16 [in / group_size, out, 2].
    """
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    chunks = layer.weight.split(PACKED_ROWS)
    weight = torch.cat([convert(unpack_int4(rows).int() + 8, 1) for rows in chunks])
    num_groups = layer.in_features // (layer.group_size or GROUP_SIZE)
    scale = layer.weight_scale.bfloat16().reshape(layer.out_features, -1).T
    scale = scale.expand(num_groups, -1)
    return weight, torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()


@torch.no_grad()
def matmul(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    rows = x.reshape(-1, layer.in_features)
    if len(rows) > MAX_ROWS:
        return torch_matmul(x, layer)
    if layer.bits == 8:
        scale = layer.weight_scale.bfloat16()
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), layer.weight, scale)
    else:
        if layer.packed is None:
            layer.packed = pack(layer)
        group_size = layer.group_size or GROUP_SIZE
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(rows.contiguous(), layer.packed[0], group_size, layer.packed[1])
    return y.unflatten(0, x.shape[:-1])
