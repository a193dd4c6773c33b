"""Measure what int8 activations, as prompts have them on a CPU, cost products of the 6B shapes.

    python resources/measure_activations.py

Weights and activations are random (normal). Outliers are channels, the same for all tokens, that
are 20 times as large as the others, as large language models have some (LLM.int8(), arXiv
2208.07339); how many the real model has is not known. Printed is the norm of the error that the
rounding adds to a product, the largest of INT8, INT4 and group-wise INT4 weights, relative to the
norm of the exact product, and to that of its part that is not due to outliers.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from chatglm2.kernels import cpu_backend  # noqa: E402
from chatglm2.quantization import QuantizedLinear  # noqa: E402

SHAPES = {  # in, out
    "query_key_value": (4096, 4608),
    "dense": (4096, 4096),
    "dense_h_to_4h": (4096, 27392),
    "dense_4h_to_h": (13696, 4096),
}
WAYS = [(8, None), (4, None), (4, 128)]  # bits, group size
OUTLIER_SIZE = 20
NUM_TOKENS = 32


def draw_activations(num_channels: int, num_outliers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations [tokens, channels], and the same without the outliers."""
    x, outliers = torch.randn(NUM_TOKENS, num_channels), torch.randperm(num_channels)[:num_outliers]
    rest = x.index_fill(1, outliers, 0)
    x[:, outliers] *= OUTLIER_SIZE
    return x, rest


def create_layers(weight: torch.Tensor) -> list[QuantizedLinear]:
    """Return the layer of a weight [out, in] in each way to quantize it."""
    layers = [QuantizedLinear(*reversed(weight.shape), *way) for way in WAYS]
    for layer in layers:
        layer.weight.data, layer.weight_scale.data = layer.quantize(weight)
    return layers


def measure(layer: QuantizedLinear, x: torch.Tensor, rest: torch.Tensor) -> tuple[float, float]:
    """Return the error relative to the exact product and to its part without outliers."""
    exact = cpu_backend.matmul(x, layer)
    error = (cpu_backend.prompt_matmul(x, layer) - exact).norm()
    return (error / exact.norm()).item(), (error / cpu_backend.matmul(rest, layer).norm()).item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--outliers", type=utils.number(int, 0, 4095), nargs="+", default=[0, 6, 64],
        help="numbers of channels to try (default: 0 6 64)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if problem := cpu_backend.get_library()[1]:
        raise SystemExit(f"The C kernels are needed: {problem}.")
    torch.manual_seed(0)
    print("| outliers |", " | ".join(SHAPES), "|")
    print("|---" * (len(SHAPES) + 1), end="|\n")
    cells = {number: [] for number in args.outliers}
    for num_inputs, num_outputs in SHAPES.values():
        layers = create_layers(torch.randn(num_outputs, num_inputs))
        for number, row in cells.items():
            inputs = draw_activations(num_inputs, number)
            errors = [measure(layer, *inputs) for layer in layers]
            row.append("{:.1%} / {:.1%}".format(*map(max, zip(*errors, strict=True))))
    for number, row in cells.items():
        print(f"| {number} |", " | ".join(row), "|")


if __name__ == "__main__":
    main()
