"""`measure_activations.py`: its errors against the formula of int8 activations, and its table."""

import measure_activations
import pytest
import torch
from measure_activations import create_layers, draw_activations, measure

from chatglm2.kernels import build_cpu
from chatglm2.quantization import torch_matmul


@pytest.fixture(autouse=True)
def need_library():
    problem = build_cpu.get_library()[1]
    if problem and ("no C compiler" in problem or "this CPU lacks" in problem):
        pytest.skip(problem)
    assert problem is None


def round_groups(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(1)


@torch.no_grad()
def test_errors_are_those_of_rounding_groups_of_channels():
    torch.manual_seed(0)
    for layer in create_layers(torch.randn(64, 1024)):
        x, rest = draw_activations(1024, 6)
        exact = torch_matmul(x, layer)
        error = (torch_matmul(round_groups(x), layer) - exact).norm()
        expected = [(error / y.norm()).item() for y in (exact, torch_matmul(rest, layer))]
        assert measure(layer, x, rest) == pytest.approx(expected, rel=0.02)
        assert expected[0] < expected[1]


def test_outliers():
    x, rest = draw_activations(256, 3)
    assert ((rest == 0).all(0)).sum() == 3
    outliers = (rest == 0).all(0)
    assert torch.equal(x[:, ~outliers], rest[:, ~outliers])
    assert 10 < x[:, outliers].std() < 30


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(measure_activations, "SHAPES", {"a": (256, 32), "b": (384, 16)})
    measure_activations.main(["--outliers", "0", "5"])
    header, _, none, some = capsys.readouterr().out.splitlines()
    assert header == "| outliers | a | b |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (none, some)]
    assert [row[0] for row in cells] == ["0", "5"]
    for _, *errors in cells:
        for error in errors:
            total, rest = (float(part.removesuffix("%")) for part in error.split(" / "))
            assert 0 < total <= rest < 20
