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
@pytest.mark.parametrize("num_rows", [2, 32, 34])
def test_error_is_that_of_plain_torch(bits, group_size, num_rows):
    layer = create_layer(bits, group_size, dtype=DTYPE)
    assert BACKEND.find_problem(layer, CPU, DTYPE) is None
    x = torch.randn(2, num_rows // 2, layer.in_features).to(DTYPE)
    exact, y = torch_matmul(x.double(), layer), BACKEND.matmul(x, layer)
    assert y.dtype == DTYPE and y.shape == exact.shape
    assert compute_error(y, exact) <= min(0.01, 1.5 * compute_error(torch_matmul(x, layer), exact))


@can_run
@each_way
def test_every_level_and_negative_scales(bits, group_size):
    layer, x = create_exact_layer(bits, group_size, DTYPE), torch.eye(256).to(DTYPE)
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
    layer, x = create_layer(4, 128, out_features=240), torch.ones(1, 384, dtype=DTYPE)
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
    assert BACKEND.find_problem(layer, CPU, torch.float32) == "it needs bfloat16"
    sizes = (8, None, 384, 72), (8, None, 40), (8, None, 7), (4, None, 320)
    for odd in (create_layer(*size) for size in sizes):
        problem = BACKEND.find_problem(odd, CPU, DTYPE)
        assert "it needs a multiple of" in problem or "no vector instructions" in problem
    monkeypatch.setitem(torch_ops_backend.OPERATORS, 4, ["_weight_int4pack_mm_of_the_future"])
    problem = BACKEND.find_problem(layer, CPU, DTYPE)
    assert problem == "this torch has no _weight_int4pack_mm_of_the_future"
