"""Adapters: LoRA weights of PEFT, and P-Tuning v2 prefixes as the original's training saves them.

model = ChatGLMForConditionalGeneration.from_pretrained("THUDM/chatglm2-6b")
load_adapter(model, "output/checkpoint-3000")
"""

import json
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    PrefixEncoder,
    check_weight_file,
    find_weight_files,
)
from .quantization import QuantizedLinear, get_quantization

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX_KEYS = "transformer.prefix_encoder."
INSTALL_PEFT = "pip install peft==0.21.2"
# Other ways to begin a LoRA, such as PiSSA, change the weights that it is added to.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")


def load_adapter(model: ChatGLMForConditionalGeneration, folder: str | Path):
    """Add the adapter in a folder to a model, in place, to be used and not trained; return it.

    A LoRA is merged into float weights, and computed beside quantized or offloaded ones.

    Raises:
        OSError: There is no such folder, or a file is missing or damaged.
        ValueError: It holds no adapter, or one of another kind or for another model.
        ImportError: A LoRA needs PEFT.
    """
    is_quantized = get_quantization(model.config) is not None
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    read_adapter(folder, model.config, is_quantized, is_offloaded).add_to(model)
    return model


def read_adapter(
    folder: str | Path, config: ChatGLMConfig, is_quantized: bool, is_offloaded: bool = False
):
    """Return the `Lora` or `Prefix` in a folder, which fits the model of `config`.

    Args:
        is_quantized: Whether the model is, or will be when the adapter is added.
        is_offloaded: Whether some of its weights come to their device only when they are used.

    Raises:
        OSError, ValueError, ImportError: As `load_adapter`; one line that begins with the folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = "it is a file: give its folder" if folder.exists() else "there is no such folder"
        raise OSError(f"{folder}: {problem}.")
    weights, is_peft = find_weight_files(folder), (folder / PEFT_CONFIG).exists()
    if is_peft and weights:
        raise ValueError(
            f"{folder}: two kinds of adapter, {PEFT_CONFIG} of PEFT and {weights[0].name} of "
            "P-Tuning v2: give each a folder of its own."
        )
    if is_peft:
        return read_lora(folder, config, is_quantized, is_offloaded)
    if weights:
        return read_prefix(folder, weights, config)
    raise OSError(
        f"{folder}: no adapter is there, neither {PEFT_CONFIG} (LoRA) nor pytorch_model.bin or "
        "model.safetensors (P-Tuning v2)."
    )


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    check_weight_file(file)
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        # Mapped, for a whole checkpoint may be given by mistake.
        return torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds other things than tensors: it is not read.") from error


def check_tensors(folder: Path, tensors: dict, expected: dict):
    """Check that names and shapes are those expected.

    Raises:
        ValueError: They are not.
    """
    found, wanted = ({k: tuple(v.shape) for k, v in x.items()} for x in (tensors, expected))
    if wrong := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{folder}: trained on another model: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, among them {name}: {found.get(name)} in the file, {wanted.get(name)} "
            "of this model."
        )


@dataclass
class Prefix:
    """A P-Tuning v2 prefix: the keys and values of all layers, [pre_seq_len, size]."""

    weight: torch.Tensor

    def __str__(self):
        return f"P-Tuning v2 prefix of {len(self.weight)} tokens"

    def add_to(self, model: ChatGLMForConditionalGeneration):
        model.config.pre_seq_len, model.config.prefix_projection = len(self.weight), False
        with torch.device("meta"):
            encoder = PrefixEncoder(model.config)
        encoder.embedding.weight = nn.Parameter(self.weight.to(model.device))
        model.transformer.prefix_encoder = encoder.train(model.training)
        model.requires_grad_(False)


@torch.no_grad()
def read_prefix(folder: Path, files: list[Path], config: ChatGLMConfig) -> Prefix:
    """Return the prefix in weight files; its length and kind follow from the tensors."""
    if config.pre_seq_len is not None:
        raise ValueError(
            f"{folder}: the model has a P-Tuning v2 prefix already, of {config.pre_seq_len} "
            "tokens: give it without one."
        )
    tensors = {key: value for file in files for key, value in read_tensors(file).items()}
    if others := sorted(key for key in tensors if not key.startswith(PREFIX_KEYS)):
        raise ValueError(
            f"{folder}: no adapter: {files[0].name} holds {others[0]} and not only {PREFIX_KEYS}*; "
            "a whole model is given with --model."
        )
    tensors = {key.removeprefix(PREFIX_KEYS): value.float() for key, value in tensors.items()}
    has_projection, length = "trans.0.weight" in tensors, len(tensors.get("embedding.weight", ()))
    sizes = {"pre_seq_len": length, "prefix_projection": has_projection}
    with torch.device("meta"):
        encoder = PrefixEncoder(ChatGLMConfig.from_dict({**config.to_dict(), **sizes}))
    check_tensors(folder, tensors, encoder.state_dict())
    encoder.load_state_dict(tensors, assign=True)
    weight = encoder.embedding.weight
    return Prefix(encoder.trans(weight) if has_projection else weight)  # once, not for each chat


def import_peft():
    """Return PEFT: only a LoRA needs it, and importing it takes seconds."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"a LoRA needs PEFT ({error}): {INSTALL_PEFT}") from error
    return peft


@dataclass
class Lora:
    """A LoRA (arXiv 2106.09685), as PEFT takes it."""

    config: "peft.LoraConfig"  # noqa: F821
    tensors: dict[str, torch.Tensor]
    is_quantized: bool
    is_offloaded: bool

    def __str__(self):
        how = "merged into the weights" if self.is_merged else f"computed beside {self.weights}"
        return f"LoRA of rank {self.config.r}, {how}"

    @property
    def is_merged(self) -> bool:
        return not (self.is_quantized or self.is_offloaded)

    @property
    def weights(self) -> str:
        return "quantized weights" if self.is_quantized else "weights that are partly elsewhere"

    def inject(self, model: ChatGLMForConditionalGeneration):
        """Put PEFT's layers, without data, around the model's."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*QuantizedLinear.*", UserWarning)
            return import_peft().LoraModel(model, self.config, "default", low_cpu_mem_usage=True)

    def add_to(self, model: ChatGLMForConditionalGeneration):
        is_training = model.training
        lora = self.inject(model)
        tensors = {key: value.to(model.dtype) for key, value in self.tensors.items()}
        import_peft().set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        place_tensors(model, tensors)
        if self.is_merged:
            lora.merge_and_unload(safe_merge=True)
        model.train(is_training).requires_grad_(False)  # else the new layers' dropout is on


def place_tensors(model: ChatGLMForConditionalGeneration, tensors: dict[str, torch.Tensor]):
    """Bring a LoRA's tensors to where their layers compute.

    PEFT leaves whole layers on the CPU, and moves what belongs to an offloaded weight to the meta
    device, where its data is lost.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device, set_module_tensor_to_device

    for path, layer in [*model.named_modules()]:
        original = getattr(layer, "original_module", getattr(layer, "base_layer", None))
        if original is None:
            continue
        if hasattr(layer, "modules_to_save") and next(original.parameters()).is_meta:
            # Its hook would fetch the original's weight.
            remove_hook_from_module(layer.modules_to_save["default"], recurse=True)
        with align_module_device(original):  # what is offloaded is fetched, once
            device = next(original.parameters()).device
        for name, parameter in [*layer.named_parameters()]:
            key = f"{path}.{name}".replace(".modules_to_save.default", "").replace(".default", "")
            if parameter.device != device and not name.startswith(("base_layer", "original")):
                set_module_tensor_to_device(layer, name, device, tensors[key])


def read_lora(folder: Path, config: ChatGLMConfig, is_quantized: bool, is_offloaded: bool) -> Lora:
    try:
        kind = json.loads((folder / PEFT_CONFIG).read_bytes())["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{folder}: {PEFT_CONFIG} is damaged: download it again.") from error
    if kind != "LORA":
        raise ValueError(
            f"{folder}: an adapter of PEFT's type {kind}; LORA can be loaded, and the P-Tuning v2 "
            "prefixes of the original's training."
        )
    if not (files := [folder / name for name in PEFT_WEIGHTS if (folder / name).exists()]):
        raise OSError(f"{folder}: it has no {' or '.join(PEFT_WEIGHTS)}: download it again.")
    lora_config = read_lora_config(folder, is_quantized)
    tensors = {k.removeprefix("base_model.model."): v for k, v in read_tensors(files[0]).items()}
    lora = Lora(lora_config, tensors, is_quantized, is_offloaded)
    check_lora(folder, lora, config)
    return lora


def read_lora_config(folder: Path, is_quantized: bool):
    peft = import_peft()
    config = peft.LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    if config.init_lora_weights not in INITIALIZATIONS:
        raise ValueError(
            f"{folder}: a LoRA for weights that {config.init_lora_weights} changed when it was "
            "begun: save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if is_quantized:
        if not hasattr(config, "_register_custom_module"):
            raise ImportError(f"this version of PEFT takes no quantized layers: {INSTALL_PEFT}")
        # PEFT's guide to custom models names it for layers that PEFT does not know.
        config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    return config


def check_lora(folder: Path, lora: Lora, config: ChatGLMConfig):
    """Try it on a model without data, which takes no time.

    Raises:
        ValueError: It is for another model, or cannot be computed beside the weights.
    """
    sizes = {**config.to_dict(), "quantization_bit": 0, "quantization_config": None}
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig.from_dict(sizes))
    try:
        lora.inject(model)
    except ValueError as error:
        raise ValueError(f"{folder}: trained on another model: {error}") from error
    expected = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    check_tensors(folder, lora.tensors, expected)
    if not lora.is_merged and any(getattr(x, "lora_variant", None) for x in model.modules()):
        raise ValueError(
            f"{folder}: a variant of LoRA, such as DoRA, cannot be computed beside {lora.weights}: "
            "leave --quantize and --offload-folder out."
        )
