"""INT8 and INT4 weights: the official row-wise format, and INT4 with a scale for each group.

The four linear layers of each block, and the output layer if asked for, hold `weight` (int8; INT4
packed two to a byte) and `weight_scale`; a weight is level * scale. This file is also Hugging Face
remote code: several copies of it may live in one process.
"""

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

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

QUANT_METHOD = "chatglm"
GROUP_SIZE = 128  # columns that share a scale in group-wise INT4
LINEAR_NAMES = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
CHUNK_WEIGHTS = 1 << 19  # as many are float at a time on a CPU: they stay in its cache


def quantize_rows(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a float matrix to levels, not packed, and scales.

    As the original, the scale of a row is its largest magnitude / 7 (INT4) or / 127 (INT8), and all
    arithmetic is in the weight's dtype; unlike there, no level wraps around. Of a group of
    `group_size` columns, the value of largest magnitude gets the level -8, which the rows leave
    unused (so the scale may be negative): a seventh finer steps.

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
    """Return the float matrix [out, in] that a stored one stands for, in `dtype`."""
    levels = (unpack_int4(weight) if bits == 4 else weight).to(dtype)
    scale = weight_scale.to(dtype).reshape(len(levels), -1, 1)
    return (levels.unflatten(-1, (scale.shape[1], -1)) * scale).flatten(-2)


class ChunkedLinear(torch.autograd.Function):
    """x @ W.T, where W is made a chunk of rows at a time, and again for the gradient of x.

    So the float matrix never exists as a whole on a CPU, and is not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, make_rows, *stored):
        ctx.make_rows = make_rows
        ctx.chunk_size = len(stored[0])
        if x.device.type == "cpu":
            ctx.chunk_size = max(1, CHUNK_WEIGHTS // x.shape[-1])
        ctx.save_for_backward(*stored)
        chunks = zip(*(tensor.split(ctx.chunk_size) for tensor in stored), strict=True)
        return torch.cat([F.linear(x, make_rows(*chunk, dtype=x.dtype)) for chunk in chunks], -1)

    @staticmethod
    def backward(ctx, grad_output):
        stored = [tensor.split(ctx.chunk_size) for tensor in ctx.saved_tensors]
        grads = grad_output.split(ctx.chunk_size, dim=-1)
        grad_x = sum(
            grad @ ctx.make_rows(*chunk, dtype=grad.dtype)
            for grad, *chunk in zip(grads, *stored, strict=True)
        )
        return grad_x, None, *(None for _ in stored)


def torch_matmul(x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
    """Multiply in plain torch: any device, any dtype; what backends are tested against."""
    make_rows = partial(dequantize, bits=layer.bits)
    return ChunkedLinear.apply(x, make_rows, layer.weight, layer.weight_scale)


# Backends in order of preference: the device type it is for, and its module in chatglm2/kernels/.
# A module offers matmul(x [..., in], layer), which returns x @ W.T [..., out], and
# find_problem(layer, x_device, dtype), which returns why it cannot serve, or None. It may offer
# - prepare(layer), which packs the weight as it wants it,
# - prompt_matmul(x, layer), a faster but less exact product for prompts,
# - stored_matmul(x, weight), for the weights of 16 bits,
# - place(weight), which copies such a weight to where it is read fastest,
# - release_pages(parameters), which frees memory once all weights are packed,
# - encode(transformer, inputs, num_prompt_tokens), all blocks at once, or None if it cannot.
BACKENDS = {
    "triton": ("cuda", "triton_backend"),
    "cuda": ("cuda", "cuda_backend"),
    "cpu": ("cpu", "cpu_backend"),
    "torch_ops": ("cpu", "torch_ops_backend"),
    "torch": (None, None),  # `torch_matmul`: always there
}
BACKEND_VARIABLE = "CHATGLM_BACKEND"  # of the environment: forces one


def get_forced_backend() -> str | None:
    """Return the backend that the environment names.

    Raises:
        ValueError: There is none of that name.
    """
    name = os.environ.get(BACKEND_VARIABLE) or None
    if name not in (None, *BACKENDS):
        allowed = ", ".join(BACKENDS)
        raise ValueError(f"{BACKEND_VARIABLE} is {name!r}: give one of {allowed}, or unset it")
    return name


def load_backend(name: str, layers, device: torch.device, dtype: torch.dtype):
    """Return a backend's module, or None, and why it cannot serve the layers, or None."""
    if name == "torch":
        return SimpleNamespace(matmul=torch_matmul), None
    try:  # remote code has no such folder
        module = importlib.import_module(f"chatglm2.kernels.{BACKENDS[name][1]}")
    except ImportError as error:
        return None, str(error)
    problems = (module.find_problem(layer, device, dtype) for layer in layers)
    problem = next(filter(None, problems), None)
    return (None, problem) if problem else (module, None)


def pick_backend(layers, device: torch.device, dtype: torch.dtype):
    """Return the module of the first backend that can serve all layers, and tell which and why.

    Raises:
        ValueError: The one that the environment names cannot.
    """
    forced = get_forced_backend()
    names = [name for name, (kind, _) in BACKENDS.items() if kind in (None, device.type)]
    where, reasons = f"{device} in {str(dtype).removeprefix('torch.')}", []
    for name in [forced] if forced else names:
        backend, problem = load_backend(name, layers, device, dtype)
        if backend:
            reasons = [f"{BACKEND_VARIABLE} says so"] if forced else reasons
            why = "; ".join(reasons) or ("the fastest" if name != "torch" else "the only one here")
            logger.warning_once(f"Quantized layers on {where}: backend {name} ({why})")
            return backend
        reasons.append(f"not {name}: {problem}")
    raise ValueError(
        f"{BACKEND_VARIABLE} is {forced!r}, which cannot serve {where}: {problem}; give another "
        f"of {', '.join(BACKENDS)}, or unset it"
    )


class Role(threading.local):
    """What a thread computes; a copy is of no thread.

    Attributes:
        num_prompt_tokens: So many tokens of the current forward, from the first on, are a prompt's.
    """

    num_prompt_tokens = 0

    def __reduce__(self):
        return Role, ()


class ModelBackend:
    """What the quantized layers of a model share: one backend for each device and dtype.

    Attributes:
        kinds: For each size of layer in the model, one without data.
        picked: A backend's functions by their names, for each device and dtype.
        role: Which tokens are a prompt's; all others are multiplied exactly, however many.
    """

    def __init__(self):
        self.kinds, self.picked, self.role = {}, {}, Role()

    def add(self, layer: "QuantizedLinear"):
        sizes = layer.in_features, layer.out_features, layer.bits, layer.group_size
        if sizes not in self.kinds:
            self.kinds[sizes] = QuantizedLinear(*sizes, device="meta")
            self.picked.clear()  # which served all kinds before
        layer.backend = self

    def get(self, function: str, device: torch.device, dtype: torch.dtype) -> Callable | None:
        """Return a function of the backend, e.g. `matmul`, or None if it has no such."""
        if (device, dtype) not in self.picked:
            backend = pick_backend(self.kinds.values(), device, dtype)
            names = "matmul", "prepare", "prompt_matmul", "stored_matmul", "place"
            names += "release_pages", "encode"
            self.picked[device, dtype] = {name: getattr(backend, name, None) for name in names}
        return self.picked[device, dtype][function]

    @contextmanager
    def computing_prompt(self, num_tokens: int):
        """Within, let this thread's first `num_tokens` tokens of a row count as a prompt's."""
        outer, self.role.num_prompt_tokens = self.role.num_prompt_tokens, num_tokens
        try:
            yield
        finally:
            self.role.num_prompt_tokens = outer

    def multiply(self, x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
        """Return x @ W.T, for x [..., tokens, in] each token by the product of its role."""
        matmul, prompt_matmul = self.get("matmul", x.device, x.dtype), None
        if length := self.role.num_prompt_tokens:
            prompt_matmul = self.get("prompt_matmul", x.device, x.dtype)
        if prompt_matmul is None:
            return matmul(x, layer)
        if length >= x.shape[-2]:
            return prompt_matmul(x, layer)
        prompt, rest = x[..., :length, :], x[..., length:, :]
        return torch.cat((prompt_matmul(prompt, layer), matmul(rest, layer)), dim=-2)

    def encode(self, transformer: nn.Module, inputs: dict) -> torch.Tensor | None:
        """Return the last block's hidden states if the backend can compute all blocks at once.

        Args:
            inputs: The arguments of `GLMTransformer.forward`, but with the model's
                `attention_mask` and `position_ids`.
        """
        states = inputs["hidden_states"]
        encode = self.get("encode", states.device, states.dtype)
        return encode and encode(transformer, inputs, self.role.num_prompt_tokens)


def quantized_matmul(x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
    """Return x @ W.T in the model's backend; in plain torch where x needs a gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        return torch_matmul(x, layer)
    if layer.is_offloaded and x.device.type == "cpu":
        return torch_matmul(x, layer)
    if layer.backend is None:  # a layer outside of a model
        ModelBackend().add(layer)
    return layer.backend.multiply(x, layer)


REPLACING = threading.RLock()  # of weights: threads may share a model


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight; it computes in the dtype of its input.

    Attributes:
        weight: int8 [out, in] for 8 bits, [out, in / 2] for 4; no conversion changes its dtype.
        weight_scale: [out], or [out, in / group_size].
        backend: What the model's layers share.
        packed: A backend's own copy of the weight, or None; dropped when the weight changes.
        replacement: What a backend holds in place of the weight, or None. The parameter then has
            no data (it is on the meta device), but whoever asks for `layer.weight`, a state dict,
            a copy or a conversion gets the official bytes back.
        is_offloaded: Whether accelerate fetches the weight for each product anew, so that packing
            it is no use.
    """

    backend: ModelBackend | None = None
    packed = None
    replacement = None
    is_offloaded = False

    def __init__(
        self, in_features, out_features, bits, group_size=None, bias=None, dtype=None, device=None
    ):
        super().__init__()
        if in_features % (group_size or 2):
            raise ValueError(
                f"a layer with {in_features} inputs cannot have {bits}-bit weights: the number "
                f"must be a multiple of {group_size or 2}"
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
        """Return the quantized layer; with `empty` only its shapes, to be loaded."""
        options = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        if not empty:
            options["device"] = "meta"
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, bits, group_size, linear.bias, **options)
        if not empty:
            weight, scale = layer.quantize(linear.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        return layer

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what this layer stores for a float weight [out, in]."""
        size = max(1, CHUNK_WEIGHTS // self.in_features)
        chunks = (quantize_rows(rows, self.bits, self.group_size) for rows in weight.split(size))
        stored = [(pack_int4(x) if self.bits == 4 else x, scale) for x, scale in chunks]
        levels, scales = zip(*stored, strict=True)
        return torch.cat(levels), torch.cat(scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = quantized_matmul(x, self)
        return y if self.bias is None else y + self.bias

    def replace_weight(self, make: Callable):
        """Return the replacement; if there is none, `make(layer)` first, and release the weight.

        A replacement's `restore()` returns the weight.
        """
        with REPLACING, torch.inference_mode(False):
            if self.replacement is None:
                replacement = make(self)
                empty = torch.empty_like(self.weight, device="meta")
                self.weight = nn.Parameter(empty, requires_grad=False)
                self.replacement = replacement
            return self.replacement

    @contextmanager
    def restored(self):
        """Let the weight be the official one, and keep other threads from replacing it."""
        with REPLACING:
            if self.replacement is not None:
                with torch.inference_mode(False):  # the tensor may later serve a backward pass
                    weight, self.replacement = self.replacement.restore(), None
                    self.weight = nn.Parameter(weight, requires_grad=False)
            yield

    def __getattr__(self, name):  # of what is no plain attribute: parameters
        if name not in ("weight", "weight_scale"):
            return super().__getattr__(name)
        with self.restored():
            return super().__getattr__(name)

    def __setattr__(self, name, value):
        if name not in ("weight", "weight_scale"):
            super().__setattr__(name, value)
            return
        with self.restored():
            self.packed = None
            super().__setattr__(name, value)

    def __getstate__(self):
        with self.restored():
            return super().__getstate__()

    def _save_to_state_dict(self, *args, **kwargs):
        with self.restored():
            super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        with self.restored():
            self.packed = None
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        with self.restored():
            self.packed = None
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}"


def narrow(weight: torch.Tensor) -> nn.Parameter:
    """Return a weight to be stored in 16 bits: float32 becomes float16."""
    if weight.dtype == torch.float32:
        weight = weight.detach().half()
    return nn.Parameter(weight, requires_grad=False)


class StoredIn16Bits:
    """Mixin of layers whose weight moves between devices but keeps its dtype, cast where used."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor.new_empty(0))
            return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class StoredEmbedding(StoredIn16Bits, nn.Embedding):
    """The embedding of a quantized model: float16 or bfloat16, its output in `compute_dtype`."""

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
    """The output layer of a quantized model: float16 or bfloat16, cast to its input's dtype."""

    backend: ModelBackend | None = None  # of the quantized layers

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = narrow(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        # An adapter may bring a weight of its own, in float32.
        if self.backend is not None and not needs_grad and self.weight.itemsize == 2:
            multiply = self.backend.get("stored_matmul", x.device, x.dtype)
            if multiply is not None:
                return multiply(x, self.weight)
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return ChunkedLinear.apply(x, torch.Tensor.to, self.weight)


@dataclass(kw_only=True)
class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """What `quantization_config` in a config.json says.

    Attributes:
        bits: 8 or 4.
        group_size: `None` for the official format, a scale for each row; 128 (with 4 bits) for a
            scale for each 128 columns of a row.
        output_bits: `None` for the official format, an output layer of 16 bits; 8 for INT8 with a
            scale for each row.
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
        """Return the fields; the official format's stay what they were without `output_bits`."""
        fields = super().to_dict()
        if self.output_bits is None:
            del fields["output_bits"]
        return fields


def replace_layers(transformer: nn.Module, config: ChatGLMQuantizationConfig, empty=False):
    """Put quantized layers into a ChatGLMModel, one by one; with `empty`, to be loaded."""
    get_forced_backend()  # a wrong name is told before the work
    check_output_layer(transformer, config)
    backend = transformer.backend = ModelBackend()
    for block in transformer.encoder.layers:
        for name in LINEAR_NAMES:
            linear = block.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"{name} is a {type(linear).__name__}: quantize before adding adapters"
                )
            layer = QuantizedLinear.from_linear(linear, config.bits, config.group_size, empty)
            backend.add(layer)
            block.set_submodule(name, layer)
    embedding = transformer.embedding.word_embeddings
    transformer.embedding.word_embeddings = StoredEmbedding(embedding)
    if config.output_bits:
        quantize_output_layer(transformer, config, empty)
    else:
        transformer.output_layer = StoredLinear(transformer.output_layer)
        transformer.output_layer.backend = backend


def check_output_layer(transformer: nn.Module, config: ChatGLMQuantizationConfig):
    """Check that the output layer can have the bits that are asked for.

    Raises:
        ValueError: Its weight is that of the embedding too, or it is no plain layer.
    """
    if not config.output_bits:
        return
    if transformer.config.tie_word_embeddings:
        raise ValueError(
            f"output_bits is {config.output_bits}, but output layer and embedding share their "
            "weight (tie_word_embeddings): leave it out"
        )
    if type(transformer.output_layer) not in (nn.Linear, StoredLinear):
        kind = type(transformer.output_layer).__name__
        raise ValueError(f"output_layer is a {kind}: quantize before adding adapters")


def quantize_output_layer(transformer: nn.Module, config: ChatGLMQuantizationConfig, empty=False):
    """Put a quantized output layer into a ChatGLMModel whose blocks are quantized."""
    layer = QuantizedLinear.from_linear(transformer.output_layer, config.output_bits, None, empty)
    transformer.backend.add(layer)
    transformer.output_layer = layer


def prepare_layers(model):
    """Pick the backend of a quantized model and pack its weights now, not at the first question."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and not layer.is_offloaded:
            prepare = layer.backend.get("prepare", layer.weight.device, model.dtype)
            if prepare is not None:
                prepare(layer)
        elif isinstance(layer, StoredLinear) and layer.backend is not None:
            place = layer.backend.get("place", model.device, model.dtype)
            if place is not None:
                layer.weight.data = place(layer.weight.data)
    if release := model.base_model.backend.get("release_pages", model.device, model.dtype):
        release(model.parameters())


def mark_offloaded(model):
    """Note which layers of a loaded model have their weight elsewhere."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.is_offloaded = layer.weight.is_meta


def get_quantization(model_config) -> ChatGLMQuantizationConfig | None:
    """Return how a model's config says that it is quantized.

    Raises:
        ValueError: By another library, or `quantization_bit` was set without the rest.
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
    """Whether a model is quantized as wanted; False if it is not, or that is of another library.

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
    """Turns a float weight of the checkpoint into weight and scale, before the next is read."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        levels, scale = layer.quantize(weight)
        return {full_layer_name: levels, f"{full_layer_name}_scale": scale}


class ChatGLMQuantizer(HfQuantizer):
    """transformers' hook for loading quantized checkpoints, and for quantizing while loading.

    The first copy of this file that is imported serves all: it asks a model for nothing but its
    modules' names, and gives it layers of its own.
    """

    def _process_model_before_weight_loading(self, model, dtype=None, **kwargs):
        if self.pre_quantized:  # the model has made the layers itself
            return
        replace_layers(model.base_model, self.quantization_config, empty=True)
        if Version(transformers.__version__).release < (5, 23):
            # The loader casts each weight to its parameter's dtype before it is quantized.
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    shape = layer.out_features, layer.in_features
                    layer.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.config.quantization_bit = self.quantization_config.bits
        transformer = model.base_model
        transformer.embedding.word_embeddings.requires_grad_(False)
        transformer.output_layer.requires_grad_(False)
        for block in transformer.encoder.layers:
            for name in LINEAR_NAMES:
                block.get_submodule(name).weight_scale.requires_grad_(False)
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

    @property
    def is_trainable(self) -> bool:
        return True  # the inputs of quantized layers have gradients: adapters, P-Tuning v2

    @property
    def is_qat_trainable(self) -> bool:
        return True  # what Trainer asks for without PEFT; P-Tuning v2 trains a prefix only


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(ChatGLMQuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(ChatGLMQuantizer)
