"""Backends: faster products with the weights of quantized layers.

A backend is a subclass of `Backend` in its own file and a row of `BACKENDS`. Without this folder,
quantized layers compute in plain PyTorch, which every backend is tested against.
"""

import importlib
import os

import torch
from torch import nn
from transformers.utils import logging

from chatglm2.quantization import BACKEND_VARIABLE, QuantizedLinear, torch_stored_matmul

logger = logging.get_logger(__name__)

# In order of preference: name, device type, class. "torch" is plain PyTorch, on any device.
BACKENDS = {
    "triton": ("cuda", "triton_backend.TritonBackend"),
    "cuda": ("cuda", "cuda_backend.CudaBackend"),
    "cpu": ("cpu", "cpu_backend.CPUBackend"),
    "torch_ops": ("cpu", "torch_ops_backend.TorchOpsBackend"),
    "torch": (None, None),
}


class Backend:
    """Multiplies by the weights of a model's quantized layers, on one device in one dtype.

    A subclass defines `find_problem` and `matmul`, and overrides the other methods where it can do
    better. Gradients are always computed in plain PyTorch.

    Attributes:
        note: What is printed behind the name, because it changes results.
    """

    note = ""

    def find_problem(
        self, layer: QuantizedLinear, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Return why this backend cannot serve a layer, or None.

        Args:
            layer: A layer of the sizes and the format in question; its weight may be on meta.
            device: The device of the input and the weight.
            dtype: The dtype of the input.
        """
        raise NotImplementedError

    def matmul(self, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        """Return x @ W.T, without the layer's bias.

        Shapes: x [..., in]; returns [..., out] in the dtype of x.
        """
        raise NotImplementedError

    def stored_matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T in the dtype of x, for a float16 or bfloat16 weight [out, in]."""
        return torch_stored_matmul(x, weight)

    def prepare(self, layer: QuantizedLinear):
        """Bring the weight into this backend's order now instead of at the first product."""

    def place(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a 16-bit weight, copied to memory that is read faster if there is any."""
        return weight

    def release_pages(self, parameters):
        """Free memory that is no longer needed after all layers are prepared."""

    def encode(self, transformer: nn.Module, inputs: dict) -> torch.Tensor | None:
        """Return the hidden states after the last layer, or None to call the modules.

        Args:
            transformer: A `ChatGLMModel`.
            inputs: The arguments of `GLMTransformer.forward`, but with the `attention_mask` and
                `position_ids` that the model was called with.
        """
        return None


def get_forced_backend() -> str | None:
    """Return the name of the backend that the environment requests, or None.

    Raises:
        ValueError: There is no backend of this name.
    """
    name = os.environ.get(BACKEND_VARIABLE) or None
    if name not in (None, *BACKENDS):
        allowed = ", ".join(BACKENDS)
        raise ValueError(f"{BACKEND_VARIABLE} is {name!r}: give one of {allowed}, or unset it")
    return name


def load_backend(
    name: str, layers, device: torch.device, dtype: torch.dtype
) -> tuple[Backend | None, str | None]:
    """Return a backend and why it cannot serve the layers, or None."""
    _, path = BACKENDS[name]
    if path is None:
        return None, None
    module, _, class_name = path.partition(".")
    try:
        backend = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)()
    except ImportError as error:  # of what it needs, such as Triton
        return None, str(error)
    problems = (backend.find_problem(layer, device, dtype) for layer in layers)
    return backend, next(filter(None, problems), None)


def pick_backend(layers, device: torch.device, dtype: torch.dtype) -> Backend | None:
    """Return the first backend that can serve all layers, or None for plain PyTorch.

    The choice is printed with its reason.

    Raises:
        ValueError: The backend that the environment requests cannot serve the layers.
    """
    forced = get_forced_backend()
    names = [name for name, (kind, _) in BACKENDS.items() if kind in (None, device.type)]
    where, reasons = f"{device} in {str(dtype).removeprefix('torch.')}", []
    for name in [forced] if forced else names:
        backend, problem = load_backend(name, layers, device, dtype)
        if problem is None:
            reasons = [f"{BACKEND_VARIABLE} says so"] if forced else reasons
            why = "; ".join(reasons) or ("the fastest" if name != "torch" else "the only one here")
            note = backend.note if backend else ""
            logger.warning_once(f"Quantized layers on {where}: backend {name}{note} ({why})")
            return backend
        reasons.append(f"not {name}: {problem}")
    raise ValueError(
        f"{BACKEND_VARIABLE} is {forced!r}, which cannot serve {where}: {problem}; give another "
        f"of {', '.join(BACKENDS)}, or unset it"
    )
