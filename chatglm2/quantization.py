"""INT8 and INT4 weights: the official format with a scale for each row, and INT4 in groups.

    W[r, c] = level(r, c) * weight_scale[r, c // group_size]

The four linear layers of each transformer layer, and the output layer on request, hold the levels
in `weight` (int8; INT4 packed two to a byte) and the scales in `weight_scale`. Backends in
chatglm2/kernels/ multiply faster than the plain PyTorch here. This file is also Hugging Face remote
code: that folder may be missing, and several copies of this file may live in one process.
"""

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

# Before 5.23, transformers casts a weight to its parameter's dtype and then quantizes it, so until
# then the parameter must be float.
CASTS_BEFORE_QUANTIZING = Version(transformers.__version__).release < (5, 23)

QUANT_METHOD = "chatglm"
GROUP_SIZE = 128  # columns that share a scale in group-wise INT4
LINEAR_NAMES = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
BLOCK_WEIGHTS = 1 << 19  # number of weights that are float at a time, to stay in a CPU's cache
BACKEND_VARIABLE = "CHATGLM_BACKEND"  # environment variable that requests a backend by name


def quantize_rows(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels, not packed, and the scales of a float matrix.

    As in the original, the scale of a row is its largest magnitude / 7 (INT4) or / 127 (INT8), and
    all arithmetic is in the weight's dtype. Unlike there, no level wraps around. In a group of
    `group_size` columns, the value of largest magnitude gets the level -8, which is not used
    without groups: the scale may be negative, and the steps are a seventh finer.

    >>> quantize_rows(torch.tensor([[3.5, -0.7, 0.2, -1.0], [0.0, 0.0, 0.0, 0.0]]), bits=4)
    (tensor([[ 7, -1,  0, -2],
            [ 0,  0,  0,  0]], dtype=torch.int8), tensor([0.5000, 0.0000]))

    Shapes: weight [out, in]; levels [out, in]; scales [out], or [out, in / group_size].
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if group_size is None:
        groups = weight
        scale = weight.abs().amax(-1, keepdim=True) / highest
    else:
        groups = weight.unflatten(-1, (-1, group_size))
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / lowest
    ratio = (groups / scale).nan_to_num_(nan=0, posinf=0, neginf=0)  # where the scale is 0
    levels = ratio.round_().clamp_(lowest, highest).to(torch.int8)
    return levels.view(weight.shape), scale.squeeze(-1)


def pack_int4(levels: torch.Tensor) -> torch.Tensor:
    """Pack two levels into each byte: the even column in the high four bits.

    >>> pack_int4(torch.tensor([[1, 2, -1, 7]], dtype=torch.int8))  # 0x12, 0xf7
    tensor([[18, -9]], dtype=torch.int8)
    """
    return (levels[..., 0::2] << 4) | (levels[..., 1::2] & 0xF)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_int4`; the shifts extend the sign.

    >>> unpack_int4(torch.tensor([[18, -9]], dtype=torch.int8))
    tensor([[ 1,  2, -1,  7]], dtype=torch.int8)
    """
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, bits: int, dtype: torch.dtype):
    """Return the float matrix [out, in] of a stored weight, in `dtype`."""
    levels = (unpack_int4(weight) if bits == 4 else weight).to(dtype)
    scale = weight_scale.to(dtype).reshape(len(levels), -1, 1)
    return (levels.unflatten(-1, (scale.shape[1], -1)) * scale).flatten(-2)


class BlockwiseLinear(torch.autograd.Function):
    """x @ W.T, where a block of rows of W is made at a time, and again for the gradient of x.

    On a CPU the float matrix never exists as a whole, and it is not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, make_rows, *stored):
        ctx.make_rows = make_rows
        ctx.block_size = len(stored[0])
        if x.device.type == "cpu":
            ctx.block_size = max(1, BLOCK_WEIGHTS // x.shape[-1])
        ctx.save_for_backward(*stored)
        blocks = zip(*(tensor.split(ctx.block_size) for tensor in stored), strict=True)
        return torch.cat([F.linear(x, make_rows(*block, dtype=x.dtype)) for block in blocks], -1)

    @staticmethod
    def backward(ctx, grad_output):
        stored = [tensor.split(ctx.block_size) for tensor in ctx.saved_tensors]
        grads = grad_output.split(ctx.block_size, dim=-1)
        grad_x = sum(
            grad @ ctx.make_rows(*block, dtype=grad.dtype)
            for grad, *block in zip(grads, *stored, strict=True)
        )
        return grad_x, None, *(None for _ in stored)


def torch_matmul(x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
    """Return x @ W.T in plain PyTorch, which backends are tested against."""
    make_rows = partial(dequantize, bits=layer.bits)
    if torch.is_grad_enabled() and layer.weight_scale.requires_grad:
        return F.linear(x, make_rows(layer.weight, layer.weight_scale, dtype=x.dtype))
    return BlockwiseLinear.apply(x, make_rows, layer.weight, layer.weight_scale)


def torch_stored_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T in plain PyTorch, in the dtype of x."""
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    if is_trained or x.dtype == weight.dtype:
        return F.linear(x, weight.to(x.dtype))
    return BlockwiseLinear.apply(x, torch.Tensor.to, weight)


def import_kernels():
    """Return chatglm2.kernels, or None for plain PyTorch if that folder is missing.

    Raises:
        ValueError: The environment requests a backend that does not exist or is missing.
    """
    try:
        import chatglm2.kernels as kernels
    except ImportError as error:
        if (name := os.environ.get(BACKEND_VARIABLE) or "torch") != "torch":
            raise ValueError(
                f"{BACKEND_VARIABLE} is {name!r}, which is not here ({error}): give torch, or "
                "unset it"
            ) from None
        logger.warning_once(f"Quantized layers: backend torch ({error})")
        return None
    kernels.get_forced_backend()
    return kernels


def pick_backend(layers, device: torch.device, dtype: torch.dtype):
    """Return the `Backend` of chatglm2/kernels/ for all layers, or None for plain PyTorch."""
    kernels = import_kernels()
    return kernels and kernels.pick_backend(layers, device, dtype)


class ModelBackend:
    """What the quantized layers of a model share: a backend for each device and dtype.

    Attributes:
        kinds: A layer without data for each size of layer in the model.
        picked: The backend for each device and dtype, or None for plain PyTorch.
    """

    def __init__(self):
        self.kinds, self.picked = {}, {}

    def add(self, layer: "QuantizedLinear"):
        sizes = layer.in_features, layer.out_features, layer.bits, layer.group_size
        if sizes not in self.kinds:
            self.kinds[sizes] = QuantizedLinear(*sizes, device="meta")
            self.picked.clear()  # a backend must serve the new kind too
        layer.backend = self

    def get(self, device: torch.device, dtype: torch.dtype):
        """Return the backend for a device and dtype, or None for plain PyTorch."""
        if (device, dtype) not in self.picked:
            self.picked[device, dtype] = pick_backend(self.kinds.values(), device, dtype)
        return self.picked[device, dtype]

    def multiply(self, x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
        """Return x @ W.T for x [..., in]."""
        backend = self.get(x.device, x.dtype)
        return torch_matmul(x, layer) if backend is None else backend.matmul(x, layer)

    def encode(self, transformer: nn.Module, inputs: dict) -> torch.Tensor | None:
        """Return the hidden states after the last layer, or None to call the modules.

        Args:
            inputs: The arguments of `GLMTransformer.forward`, but with the model's
                `attention_mask` and `position_ids`.
        """
        states = inputs["hidden_states"]
        backend = self.get(states.device, states.dtype)
        return backend and backend.encode(transformer, inputs)


PACKING = threading.RLock()  # threads may share a model


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight; it computes in the dtype of its input.

    Attributes:
        weight: int8 [out, in] for 8 bits, [out, in / 2] for 4 bits; no conversion changes its
            dtype.
        weight_scale: [out], or [out, in / group_size].
        backend: The backends that the model's layers share.
        packed: The weight in a backend's own order, or None; see `pack`.
        is_offloaded: Whether accelerate loads the weight for each product, so that packing it is
            of no use.
    """

    backend: ModelBackend | None = None
    packed = None
    is_offloaded = False

    def __init__(
        self, in_features, out_features, bits, group_size=None, bias=None, dtype=None, device=None
    ):
        super().__init__()
        if in_features % (multiple := group_size or 8 // bits):
            raise ValueError(
                f"a layer with {in_features} inputs cannot have {bits}-bit weights: the number "
                f"must be a multiple of {multiple}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        shape = (out_features, in_features * bits // 8)
        scale_shape = (out_features, in_features // group_size) if group_size else (out_features,)
        weight = torch.empty(shape, dtype=torch.int8, device=device)
        scale = torch.empty(scale_shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group_size: int | None, empty=False):
        """Return the quantized layer; if `empty`, its weights are to be loaded."""
        device = linear.weight.device if empty else "meta"
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, bits, group_size, linear.bias, linear.weight.dtype, device)
        if not empty:
            weight, scale = layer.quantize(linear.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        return layer

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what this layer stores for a float weight [out, in]."""
        size = max(1, BLOCK_WEIGHTS // self.in_features)
        blocks = (quantize_rows(rows, self.bits, self.group_size) for rows in weight.split(size))
        stored = [(pack_int4(x) if self.bits == 4 else x, scale) for x, scale in blocks]
        levels, scales = zip(*stored, strict=True)
        return torch.cat(levels), torch.cat(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = super().__getattr__("weight_scale")  # self.weight_scale restores a packed weight
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        if needs_grad or (self.is_offloaded and x.device.type == "cpu"):
            y = torch_matmul(x, self)
        else:
            if self.backend is None:  # the layer is not part of a model
                ModelBackend().add(self)
            y = self.backend.multiply(x, self)
        return y if self.bias is None else y + self.bias

    def pack(self, kind: type):
        """Return the weight in a backend's order, which is kept until the weight changes.

        If the order can be undone, the packed weight replaces the official one: the parameter then
        has no data (it is on the meta device), but `layer.weight`, a state dict, a copy or a
        conversion restores it.

        Args:
            kind: The class of the packed weight. Its `from_layer(layer)` makes it, its `restore()`,
                if it has one, returns the official weight.
        """
        with PACKING, torch.inference_mode(False):
            if type(self.packed) is not kind:
                packed = kind.from_layer(self)
                if hasattr(kind, "restore"):
                    empty = torch.empty_like(self.weight, device="meta")
                    self.weight = nn.Parameter(empty, requires_grad=False)
                self.packed = packed
            return self.packed

    @contextmanager
    def restored(self, is_changing=False):
        """Within, the weight is the official one, and no other thread packs it."""
        with PACKING:
            if hasattr(self.packed, "restore"):
                with torch.inference_mode(False):  # the tensor may later serve a backward pass
                    weight, self.packed = self.packed.restore(), None
                    self.weight = nn.Parameter(weight, requires_grad=False)
            if is_changing:
                self.packed = None
            yield

    def __getattr__(self, name):  # for parameters, which are not plain attributes
        if name not in ("weight", "weight_scale"):
            return super().__getattr__(name)
        with self.restored():
            return super().__getattr__(name)

    def __setattr__(self, name, value):
        if name not in ("weight", "weight_scale"):
            super().__setattr__(name, value)
            return
        with self.restored(is_changing=True):
            super().__setattr__(name, value)

    def __getstate__(self):
        with self.restored():
            return super().__getstate__()

    def _save_to_state_dict(self, *args, **kwargs):
        with self.restored():
            super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        with self.restored(is_changing=True):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        with self.restored(is_changing=True):
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}"


def narrow(weight: torch.Tensor) -> nn.Parameter:
    """Return a weight in 16 bits: float32 becomes float16, other dtypes stay."""
    if weight.dtype == torch.float32:
        weight = weight.detach().half()
    return nn.Parameter(weight, requires_grad=False)


class StoredIn16Bits:
    """Mixin for layers whose weight keeps its dtype when the model is converted."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor.new_empty(0))
            return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class StoredEmbedding(StoredIn16Bits, nn.Embedding):
    """The embedding of a quantized model, in 16 bits; its output is in `compute_dtype`."""

    def __init__(self, embedding: nn.Embedding):
        sizes = embedding.num_embeddings, embedding.embedding_dim
        super().__init__(*sizes, embedding.padding_idx, device="meta")
        self.compute_dtype = embedding.weight.dtype
        self.weight = narrow(embedding.weight)

    def _apply(self, fn, recurse=True):
        self.compute_dtype = fn(self.weight.new_empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).to(self.compute_dtype)


class StoredLinear(StoredIn16Bits, nn.Linear):
    """The output layer of a quantized model, in 16 bits; it computes in the dtype of its input."""

    backend: ModelBackend | None = None  # the same as that of the quantized layers

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = narrow(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        # An adapter may bring a weight of its own, in float32.
        is_served = self.backend is not None and not needs_grad and self.weight.itemsize == 2
        backend = self.backend.get(x.device, x.dtype) if is_served else None
        return (backend.stored_matmul if backend else torch_stored_matmul)(x, self.weight)


@dataclass(kw_only=True)
class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized: the `quantization_config` of a config.json.

    Attributes:
        bits: 8 or 4.
        group_size: None for a scale for each row, as in the official format; 128 (with 4 bits) for
            a scale for each 128 columns of a row.
        output_bits: None for an output layer of 16 bits, as in the official format; 8 for INT8 with
            a scale for each row.
    """

    bits: int
    group_size: int | None = None
    output_bits: int | None = None
    quant_method: str = QUANT_METHOD

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"cannot quantize to {self.bits!r} bits: give 4 or 8 (0: leave as is)")
        if self.group_size not in ((None, GROUP_SIZE) if self.bits == 4 else (None,)):
            raise ValueError(
                f"no group_size {self.group_size!r} with {self.bits} bits: leave it out, or give "
                f"{GROUP_SIZE} with 4 bits"
            )
        if self.output_bits not in (None, 8):
            raise ValueError(
                f"the output layer cannot have {self.output_bits!r} bits: give 8, or leave it out "
                "for 16"
            )

    def to_dict(self) -> dict:
        """Return the fields, without `output_bits` if it is None, as official configs."""
        fields = super().to_dict()
        if self.output_bits is None:
            del fields["output_bits"]
        return fields


def replace_layers(transformer: nn.Module, config: ChatGLMQuantizationConfig, empty=False):
    """Put quantized layers into a ChatGLMModel one by one; if `empty`, they are to be loaded."""
    import_kernels()  # this and the next checks come first: a refused model stays as it is
    for layer in transformer.encoder.layers:
        for name in LINEAR_NAMES:
            kind = type(layer.get_submodule(name))
            if kind is not nn.Linear:
                raise ValueError(f"{name} is a {kind.__name__}: quantize before adding adapters")
    if config.output_bits:
        check_output_layer(transformer, config)
    backend = transformer.backend = ModelBackend()
    for layer in transformer.encoder.layers:
        for name in LINEAR_NAMES:
            linear = layer.get_submodule(name)
            quantized = QuantizedLinear.from_linear(linear, config.bits, config.group_size, empty)
            backend.add(quantized)
            layer.set_submodule(name, quantized)
    embedding = transformer.embedding.word_embeddings
    transformer.embedding.word_embeddings = StoredEmbedding(embedding)
    if config.output_bits:
        quantize_output_layer(transformer, config, empty)
    else:
        transformer.output_layer = StoredLinear(transformer.output_layer)
        transformer.output_layer.backend = backend


def check_output_layer(transformer: nn.Module, config: ChatGLMQuantizationConfig):
    """Check that the output layer can be quantized.

    Raises:
        ValueError: It shares its weight with the embedding, or an adapter has replaced it.
    """
    linear = transformer.output_layer
    if transformer.config.tie_word_embeddings:
        raise ValueError(
            f"output_bits is {config.output_bits}, but output layer and embedding share their "
            "weight (tie_word_embeddings): leave it out"
        )
    if type(linear) not in (nn.Linear, StoredLinear):
        raise ValueError(
            f"output_layer is a {type(linear).__name__}: quantize before adding adapters"
        )


def quantize_output_layer(transformer: nn.Module, config: ChatGLMQuantizationConfig, empty=False):
    """Quantize the output layer of a ChatGLMModel, after `check_output_layer`."""
    linear = transformer.output_layer
    transformer.output_layer = QuantizedLinear.from_linear(linear, config.output_bits, None, empty)
    transformer.backend.add(transformer.output_layer)


@contextmanager
def resizing_output_layer(transformer: nn.Module):
    """Within, transformers can resize the output layer of a ChatGLMModel; it stays quantized.

    An INT8 output layer is a float one meanwhile; rows that remain keep their levels and scales.
    """
    old = transformer.output_layer
    if isinstance(old, QuantizedLinear):
        weight = dequantize(old.weight, old.weight_scale, old.bits, old.weight_scale.dtype)
        linear = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        transformer.output_layer = linear
    try:
        yield
    finally:
        new = transformer.output_layer
        if isinstance(old, QuantizedLinear):
            quantize_output_layer(transformer, get_quantization(transformer.config))
            kept = slice(min(old.out_features, new.out_features))
            transformer.output_layer.weight.data[kept] = old.weight[kept]
            transformer.output_layer.weight_scale.data[kept] = old.weight_scale[kept]
        elif isinstance(old, StoredLinear) and new is not old:
            transformer.output_layer = StoredLinear(new)
            transformer.output_layer.backend = old.backend
            transformer.output_layer.requires_grad_(old.weight.requires_grad)


def prepare_layers(model):
    """Pick the backend of a quantized model and pack its weights now, not at the first question."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and not layer.is_offloaded:
            backend = layer.backend.get(layer.weight.device, model.dtype)
            if backend is not None:
                backend.prepare(layer)
        elif isinstance(layer, StoredLinear) and layer.backend is not None:
            backend = layer.backend.get(model.device, model.dtype)
            if backend is not None:
                layer.weight.data = backend.place(layer.weight.data)
    backend = model.base_model.backend.get(model.device, model.dtype)
    if backend is not None:
        backend.release_pages(model.parameters())


def mark_offloaded(model):
    """Mark the layers of a loaded model whose weights accelerate holds elsewhere."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.is_offloaded = layer.weight.is_meta


def get_quantization(model_config) -> ChatGLMQuantizationConfig | None:
    """Return the quantization of a model from its config, or None.

    Raises:
        ValueError: Another library has quantized it, or `quantization_bit` was set alone.
    """
    config = getattr(model_config, "quantization_config", None)
    if config is None:
        if model_config.quantization_bit:
            raise ValueError(
                f"quantization_bit is {model_config.quantization_bit}, but there is no "
                "quantization_config: pass that to from_pretrained, or call model.quantize()"
            )
        return None
    fields = dict(config)
    if (method := fields.get("quant_method")) != QUANT_METHOD:
        raise ValueError(f"the model is quantized by {method}, not in ChatGLM2's format")
    return ChatGLMQuantizationConfig(**fields)


def is_quantized_so(model_config, wanted) -> bool:
    """Return True if the model already has exactly the requested quantization.

    Return False if it has none, or if the request is for another library's method.

    Raises:
        ValueError: It is quantized in another way.
    """
    present, fields = get_quantization(model_config), dict(wanted)
    if present is None or fields.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        return False
    bits, group_size = fields.get("bits"), fields.get("group_size")
    if present.bits != bits or group_size not in (None, present.group_size):
        raise ValueError(
            f"the model is quantized already, with {present.bits} bits and group_size "
            f"{present.group_size}: load the unquantized checkpoint for {bits} bits and group_size "
            f"{group_size}"
        )
    if fields.get("output_bits") not in (None, present.output_bits):
        raise ValueError(
            "the model is quantized already, its output layer is not: load it without output_bits, "
            f"then call model.quantize({bits}, output_bits={fields['output_bits']})"
        )
    return True


def quantize_model(model, bits: int, group_size: int | None = None, output_bits: int | None = None):
    """Quantize a loaded model in place and return it; see `ChatGLMPreTrainedModel.quantize`."""
    if bits == 0 and output_bits is None:
        return model
    wanted = ChatGLMQuantizationConfig(bits=bits, group_size=group_size, output_bits=output_bits)
    if not is_quantized_so(model.config, replace(wanted, output_bits=None)):
        replace_layers(model.base_model, wanted)
    elif output_bits in (None, get_quantization(model.config).output_bits):
        logger.info(f"The model is quantized to {bits} bits already.")
        return model
    else:
        wanted = replace(get_quantization(model.config), output_bits=output_bits)
        check_output_layer(model.base_model, wanted)
        quantize_output_layer(model.base_model, wanted)
    model.hf_quantizer = ChatGLMQuantizer(wanted)
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model.hf_quantizer.postprocess_model(model)
    model.tie_weights()
    return model


class QuantizeWhileLoading(ConversionOps):
    """Quantizes a float weight of the checkpoint before the next one is read."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        levels, scale = layer.quantize(weight)
        return {full_layer_name: levels, f"{full_layer_name}_scale": scale}


class ChatGLMQuantizer(HfQuantizer):
    """transformers' hook for loading quantized checkpoints, and for quantizing while loading.

    The first imported copy of this file serves the models of all copies. So it relies on nothing
    but the names of a model's modules, and gives the model this copy's layers.
    """

    is_trainable = True  # gradients reach the inputs of quantized layers, for adapters and prefixes
    is_qat_trainable = True  # Trainer requires it without PEFT; P-Tuning v2 trains only a prefix

    def _process_model_before_weight_loading(self, model, dtype=None, **kwargs):
        if self.pre_quantized:  # the model's constructor has made the layers
            return
        replace_layers(model.base_model, self.quantization_config, empty=True)
        if CASTS_BEFORE_QUANTIZING:
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    shape = layer.out_features, layer.in_features
                    layer.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.config.quantization_bit = self.quantization_config.bits
        transformer = model.base_model
        transformer.embedding.word_embeddings.requires_grad_(False)
        transformer.output_layer.requires_grad_(False)
        for layer in transformer.encoder.layers:
            for name in LINEAR_NAMES:
                layer.get_submodule(name).weight_scale.requires_grad_(False)
        return model

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        is_quantized = hasattr(model.get_submodule(module), "weight_scale")
        return is_quantized and name == "weight" and not self.pre_quantized

    def get_quantize_ops(self):
        return QuantizeWhileLoading()

    def get_new_dtype(self, converter, param, dtype):
        new_dtype = super().get_new_dtype(converter, param, dtype)
        if new_dtype is not None and not new_dtype.is_floating_point:
            raise ValueError(
                "the checkpoint's weights are not quantized, but its config says quantization_bit "
                f"{self.quantization_config.bits}: remove that, and call model.quantize()"
            )
        return new_dtype

    def is_serializable(self) -> bool:
        return True


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(ChatGLMQuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(ChatGLMQuantizer)
