"""torch's own operators against plain torch, which is the oracle of all backends."""

import pytest
import torch

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.kernels import torch_ops_backend
from chatglm2.kernels.torch_ops_backend import PackedInt4, TorchOpsBackend
from chatglm2.quantization import QuantizedLinear, torch_matmul

WAYS = [(8, None), (4, None), (4, 128)]
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
BACKEND = TorchOpsBackend()
can_run = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's operators are not used on this CPU",
)


def create_layer(bits, group_size, in_features=384, out_features=80, seed=0) -> QuantizedLinear:
    weight = torch.randn(out_features, in_features, generator=torch.manual_seed(seed)).bfloat16()
    layer = QuantizedLinear(in_features, out_features, bits, group_size)
    layer.weight.data, layer.weight_scale.data = layer.quantize(weight)
    return layer


def compute_errors(layer, num_rows: int) -> tuple[float, float]:
    """Return the operator's and plain torch's largest errors; 1 is the largest output."""
    x = torch.randn(2, num_rows // 2, layer.in_features).bfloat16()
    exact = torch_matmul(x.float(), layer)
    outputs = BACKEND.matmul(x, layer), torch_matmul(x, layer)
    assert all(y.dtype == torch.bfloat16 and y.shape == exact.shape for y in outputs)
    return tuple(((y.float() - exact).abs().max() / exact.abs().max()).item() for y in outputs)


@can_run
@pytest.mark.parametrize(("bits", "group_size"), WAYS)
@pytest.mark.parametrize("num_rows", [2, 32, 34])
def test_error_is_that_of_plain_torch(bits, group_size, num_rows):
    layer = create_layer(bits, group_size)
    assert BACKEND.find_problem(layer, CPU, torch.bfloat16) is None
    error, error_of_torch = compute_errors(layer, num_rows)
    assert error <= 0.01 and error <= 1.5 * error_of_torch


@can_run
@pytest.mark.parametrize(("bits", "group_size"), WAYS)
def test_every_level_and_negative_scales(bits, group_size):
    layer = QuantizedLinear(256, 256, bits, group_size)
    layer.weight.data = torch.arange(layer.weight.numel()).to(torch.int8).view(layer.weight.shape)
    # powers of two: every product is exact
    layer.weight_scale.data = (2.0 ** torch.randint(-3, 3, layer.weight_scale.shape)).bfloat16()
    layer.weight_scale.data.flatten()[::3] *= -1
    x = torch.eye(256).bfloat16()
    columns = [BACKEND.matmul(rows, layer) for rows in x.split(torch_ops_backend.MAX_ROWS)]
    assert torch.equal(torch.cat(columns).float(), torch_matmul(x.float(), layer))


@can_run
def test_model(tiny_checkpoint, monkeypatch):
    logits = {}
    for name in ("torch_ops", "torch"):
        monkeypatch.setenv("CHATGLM_BACKEND", name)
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=DTYPE)
        with torch.no_grad():
            logits[name] = model.quantize(4)(torch.tensor([[5, 7, 9, 11]])).logits.float()
    difference = logits["torch_ops"] - logits["torch"]
    assert 0 < difference.norm() < 0.05 * logits["torch"].norm()


@can_run
def test_weight_is_packed_in_blocks_and_again_when_it_changes(monkeypatch):
    layer, x = create_layer(4, 128, out_features=240), torch.ones(1, 384).bfloat16()
    expected = BACKEND.matmul(x, layer)
    monkeypatch.setattr(torch_ops_backend, "PACKED_ROWS", 64)
    other = create_layer(4, 128, out_features=240, seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(BACKEND.matmul(x, layer), BACKEND.matmul(x, other))
    layer.load_state_dict(create_layer(4, 128, out_features=240).state_dict())
    assert torch.equal(BACKEND.matmul(x, layer), expected)
    assert layer.state_dict().keys() == {"weight", "weight_scale"}


def test_backends_share_a_layer():
    """A weight that another backend has packed is not taken for its own."""
    layer, x = create_layer(4, None), torch.randn(1, 384).bfloat16()
    official = layer.weight.clone()

    class Inverted:
        @classmethod
        def from_layer(cls, layer):
            packed = cls()
            packed.weight = ~layer.weight
            return packed

        def restore(self):
            return ~self.weight

    expected = torch_matmul(x, layer)
    for _ in range(2):
        assert layer.pack(Inverted) is layer.pack(Inverted)
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert isinstance(layer.pack(PackedInt4), PackedInt4)
            torch.testing.assert_close(BACKEND.matmul(x, layer), expected, rtol=0.02, atol=0.05)
        assert torch.equal(layer.weight, official)


def test_layers_that_it_cannot_serve(monkeypatch):
    layer = create_layer(4, None)
    assert BACKEND.find_problem(layer, torch.device("mps"), torch.bfloat16)
    assert BACKEND.find_problem(layer, CPU, torch.float32) == "it needs bfloat16"
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        for odd in (create_layer(8, None, out_features=72), create_layer(4, None, 320)):
            problem = BACKEND.find_problem(odd, CPU, torch.bfloat16)
            assert problem.startswith("it needs a multiple of")
    monkeypatch.setitem(torch_ops_backend.OPERATORS, 4, ["_weight_int4pack_mm_of_the_future"])
    problem = BACKEND.find_problem(layer, CPU, torch.bfloat16)
    assert problem == "this torch has no _weight_int4pack_mm_of_the_future"
