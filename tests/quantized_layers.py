"""Quantized layers of random weights, for the tests of the backends."""

import pytest
import torch

from chatglm2.quantization import QuantizedLinear

each_way = pytest.mark.parametrize(
    ("bits", "group_size"), [(8, None), (4, None), (4, 128)], ids=["int8", "int4", "g128"]
)


def create_layer(
    bits=4, group_size=None, in_features=384, out_features=80, seed=0, dtype=torch.float32
) -> QuantizedLinear:
    weight = torch.randn(out_features, in_features, generator=torch.manual_seed(seed)).to(dtype)
    layer = QuantizedLinear(in_features, out_features, bits, group_size)
    layer.weight.data, layer.weight_scale.data = layer.quantize(weight)
    return layer


def create_exact_layer(bits, group_size, dtype=torch.float32) -> QuantizedLinear:
    """Every level, and scales that are powers of two, some negative: every product is exact."""
    layer = QuantizedLinear(256, 256, bits, group_size)
    layer.weight.data = torch.arange(layer.weight.numel()).to(torch.int8).view(layer.weight.shape)
    layer.weight_scale.data = (2.0 ** torch.randint(-3, 3, layer.weight_scale.shape)).to(dtype)
    layer.weight_scale.data.flatten()[::3] *= -1
    return layer


def compute_error(y, expected) -> float:
    """Return the largest error; 1 is the largest output."""
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()
