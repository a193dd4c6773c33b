"""torch's own operators against plain torch, which is the oracle of all backends."""

import pytest
import torch
from quantized_layers import compute_error, create_exact_layer, create_layer, each_way

from chatglm2 import ChatGLMForConditionalGeneration
from chatglm2.kernels import torch_ops_backend
from chatglm2.kernels.torch_ops_backend import PackedInt4, TorchOpsBackend
from chatglm2.quantization import torch_matmul

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
BACKEND = TorchOpsBackend()
can_run = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's operators are not used on this CPU",
)


@can_run
@each_way
@pytest.mark.parametrize("num_rows", [2, 32, 34, 130])
@pytest.mark.parametrize("dtype", torch_ops_backend.DTYPES)
def test_error_is_that_of_plain_torch(bits, group_size, num_rows, dtype):
    layer = create_layer(bits, group_size, dtype=dtype)
    assert BACKEND.find_problem(layer, CPU, dtype) is None
    x = torch.randn(2, num_rows // 2, layer.in_features).to(dtype)
    exact, y = torch_matmul(x.double(), layer), BACKEND.matmul(x, layer)
    assert y.dtype == dtype and y.shape == exact.shape
    plain = compute_error(torch_matmul(x.to(DTYPE), layer), exact)
    assert compute_error(y, exact) <= min(0.01, 1.5 * plain)


@can_run
@each_way
def test_every_level_and_negative_scales(bits, group_size):
    layer, x = create_exact_layer(bits, group_size, DTYPE), torch.eye(256).to(DTYPE)
    expected = torch_matmul(x.float(), layer)
    columns = [BACKEND.matmul(rows, layer) for rows in x.split(torch_ops_backend.MAX_INT8_ROWS)]
    assert torch.equal(torch.cat(columns).float(), expected)


@can_run
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
def test_model(tiny_checkpoint, monkeypatch, dtype):
    logits = {}
    for name in ("torch_ops", "torch"):
        monkeypatch.setenv("CHATGLM_BACKEND", name)
        model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
        with torch.no_grad():
            logits[name] = model.quantize(4)(torch.tensor([[5, 7, 9, 11]])).logits.float()
    difference = logits["torch_ops"] - logits["torch"]
    assert 0 < difference.norm() < 0.05 * logits["torch"].norm()


@can_run
@pytest.mark.parametrize("out_features", [240, 1104])  # the last blocks are not whole
def test_weight_is_packed_once_and_restored(out_features):
    layer, x = create_layer(4, 128, out_features=out_features), torch.ones(1, 384, dtype=DTYPE)
    official, expected = layer.weight.clone(), BACKEND.matmul(x, layer)
    assert layer._parameters["weight"].is_meta  # one copy
    assert torch.equal(layer.weight, official)
    BACKEND.prepare(layer)
    assert layer._parameters["weight"].is_meta
    assert torch.equal(layer.state_dict()["weight"], official)
    other = create_layer(4, 128, out_features=out_features, seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(BACKEND.matmul(x, layer), BACKEND.matmul(x, other))
    layer.load_state_dict(create_layer(4, 128, out_features=out_features).state_dict())
    assert torch.equal(BACKEND.matmul(x, layer), expected)


def test_backends_share_a_layer():
    """A weight that another backend has packed is not taken for its own."""
    layer, x = create_layer(), torch.randn(1, 384, dtype=DTYPE)
    official = layer.weight.clone()

    class Inverted:
        def __init__(self, layer):
            self.weight = ~layer.weight

        @classmethod
        def from_layer(cls, layer):
            return cls(layer)

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
    assert BACKEND.find_problem(layer, CPU, torch.float64) == "it cannot compute in torch.float64"
    sizes = (8, None, 384, 72), (8, None, 40), (8, None, 7), (4, None, 320)
    for odd in (create_layer(*size) for size in sizes):
        problem = BACKEND.find_problem(odd, CPU, DTYPE)
        assert "it needs a multiple of" in problem or "no vector instructions" in problem
    monkeypatch.setitem(torch_ops_backend.OPERATORS, 4, ["_weight_int4pack_mm_of_the_future"])
    problem = BACKEND.find_problem(layer, CPU, DTYPE)
    assert problem == "this torch has no _weight_int4pack_mm_of_the_future"
