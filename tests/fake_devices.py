"""GPUs for tests: tensors that say they are on one, while the CPU holds and computes them.

Within `pretend_gpus` whatever is made on, or moved to, a device of type cuda or mps is such a
tensor, and refused is what a real GPU would refuse: tensors of several devices in one operation,
and on mps what Metal cannot do (float64, products of integer matrices).
"""

import threading
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

PRETENDED = ("cuda", "mps")
aten = torch.ops.aten
MIXING = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default}  # the first one counts
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}


def list_tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]


class PretendTensor(torch.Tensor):
    """A tensor on a pretended device; `inner` holds its data on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, device=None, requires_grad=False):
        if device is None:  # accelerate makes a parameter of the class of the former one
            return torch.nn.Parameter(inner, requires_grad)
        if device.type == "mps" and inner.dtype == torch.float64:
            raise TypeError("mps has no float64")
        tensor = inner.as_subclass(cls)
        tensor.inner, tensor.pretended = inner, device
        return tensor

    @property
    def device(self) -> torch.device:
        return self.pretended

    @property
    def data(self) -> torch.Tensor:
        return PretendTensor(self.inner.data, self.pretended)

    @data.setter
    def data(self, value):
        self.inner, self.pretended = unwrap(value), value.device

    def __deepcopy__(self, memo):
        copied = PretendTensor(self.inner.clone(), self.pretended)
        copied._is_param = getattr(self, "_is_param", False)
        return copied

    def cpu(self) -> torch.Tensor:
        return self.inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list_tensors((args, kwargs))
        device = find_device(func, tensors)
        is_product = device.type == "mps" and func.overloadpacket in PRODUCTS
        if is_product and not all(x.dtype.is_floating_point for x in tensors):
            raise RuntimeError(f"{func}: mps multiplies no matrices of integers")
        moved = torch.device(kwargs.get("device") or device)
        if moved.type in PRETENDED and "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        returns = func._schema.returns
        if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return kwargs.get("out", args[0])
        return tree_map(lambda x: wrap(x, moved), result)


def wrap(x, device: torch.device):
    return PretendTensor(x, device) if isinstance(x, torch.Tensor) and is_pretended(device) else x


def unwrap(x):
    return x.inner if isinstance(x, PretendTensor) else x


def is_pretended(device) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type in PRETENDED


def with_index(device: torch.device) -> torch.device:
    return torch.device(device.type, device.index or 0)


def find_device(func, tensors: list[torch.Tensor]) -> torch.device:
    """Return the device of an operation's tensors; a single number of the CPU may be among them."""
    if func in MIXING:
        return tensors[0].device
    devices = {x.device for x in tensors if x.ndim or x.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on several devices: {sorted(map(str, devices))}")
    return devices.pop()


class PretendEvent:
    """What `generate` waits for on mps."""

    def __init__(self, device=None, blocking=False):
        self.record = self.synchronize = lambda: None


class PretendMode(TorchFunctionMode):
    """Makes tensors on pretended devices where PyTorch would start the real ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if func is torch.Tensor.to:
            return self.move(*args, **kwargs)
        device = kwargs.get("device")
        if not is_pretended(device):
            return func(*args, **kwargs)
        result = func(*args, **{**kwargs, "device": "cpu"})
        return wrap(result, with_index(torch.device(device)))

    def move(self, tensor, *args, **kwargs):
        """Tensor.to, whose arguments may be a device, a dtype, both, or another tensor."""
        values = [*args, *kwargs.values()]
        devices = [x.device for x in values if isinstance(x, torch.Tensor)]
        devices += [torch.device(x) for x in values if isinstance(x, str | torch.device)]
        if not devices:
            return tensor.to(*args, **kwargs)
        device = devices[0]
        if device.type not in PRETENDED:
            return unwrap(tensor).to(*args, **kwargs)
        dtype = next((x for x in values if isinstance(x, torch.dtype)), tensor.dtype)
        device = with_index(device)
        if tensor.device == device:
            return tensor.to(dtype)
        return PretendTensor(unwrap(tensor).to(dtype, copy=True), device)


@contextmanager
def pretend_gpus():
    """Pretend in this thread and in all that it starts."""
    run, future = threading.Thread.run, torch.__future__

    def run_pretending(self):
        with PretendMode():
            run(self)

    memory = {"mem_get_info": (80e9, 80e9), "memory_reserved": 0, "memory_allocated": 0}
    memory = {name: lambda *_, value=value: value for name, value in memory.items()}
    overwrites = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch.multiple(torch.cuda, **memory),
            patch.object(torch, "Event", PretendEvent),
            patch.object(threading.Thread, "run", run_pretending),
            PretendMode(),
        ):
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(overwrites)
