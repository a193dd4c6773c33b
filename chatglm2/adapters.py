"""Load adapters: LoRA weights of PEFT and the P-Tuning v2 prefixes of the original's training.

model = ChatGLMForConditionalGeneration.from_pretrained("THUDM/chatglm2-6b")
load_adapter(model, "output/checkpoint-3000")
"""

import re
import reprlib
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .checkpoint import read_tensors
from .configuration_chatglm import (
    ChatGLMConfig,
    check_fields,
    checked,
    choice,
    integer,
    number,
    select_fields,
)
from .errors import one_line
from .json_files import read_json
from .modeling_chatglm import ChatGLMForConditionalGeneration, PrefixEncoder
from .placement import create_empty_model
from .quantization import QuantizedLinear, get_quantization
from .recognition import PREFIX_KEYS
from .weights_chatglm import check_inside, find_weight_files

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INSTALL_PEFT = "pip install peft==0.21.2"
# Other ways to begin a LoRA, such as PiSSA, change the weights that it is added to.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
UNUSED = {  # fields of adapter_config.json without effect on a trained LoRA
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
MODULE_NAME = re.compile(r"\w+(\.\w+)*")
MAX_RANK, MAX_LAYERS = 2**16, 1000
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6
MATCHING_S = 0.3  # for the regular expressions of an adapter_config.json


def load_adapter(model: ChatGLMForConditionalGeneration, folder: str | Path):
    """Add the adapter in a folder to a model in place, for inference; return the model.

    A LoRA is merged into float weights. Beside quantized or offloaded weights it is computed
    separately.

    Raises:
        OSError: There is no such folder, or a file is missing or damaged.
        ValueError: The folder holds no adapter, one of an unknown kind or one for another model.
        ImportError: The adapter is a LoRA, and PEFT is not installed.
    """
    is_quantized = get_quantization(model.config) is not None
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    read_adapter(folder, model.config, is_quantized, is_offloaded).add_to(model)
    return model


def read_adapter(
    folder: str | Path, config: ChatGLMConfig, is_quantized: bool, is_offloaded: bool = False
):
    """Return the `Lora` or `Prefix` in a folder, after checking that it fits the config.

    Args:
        is_quantized: Whether the model will be quantized when the adapter is added.
        is_offloaded: Whether some of its weights are moved to their device only for their use.

    Raises:
        OSError, ValueError, ImportError: As `load_adapter`; one line that begins with the folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = (
            "this is a file: give its folder" if folder.exists() else "there is no such folder"
        )
        raise OSError(f"{folder}: {problem}.")
    weights, is_peft = find_weight_files(folder), (folder / PEFT_CONFIG).exists()
    if is_peft and weights:
        raise ValueError(
            f"{folder}: two adapters, {PEFT_CONFIG} of PEFT and {weights[0].name} of P-Tuning v2: "
            "put each into a folder of its own."
        )
    if is_peft:
        return read_lora(folder, config, is_quantized, is_offloaded)
    if weights:
        return read_prefix(folder, weights, config)
    raise OSError(
        f"{folder}: no adapter, neither {PEFT_CONFIG} (LoRA) nor pytorch_model.bin or "
        "model.safetensors (P-Tuning v2)."
    )


def check_tensors(folder: Path, tensors: dict, expected: dict):
    """Check the names and shapes of tensors.

    Raises:
        ValueError: They are not the expected ones.
    """
    found, wanted = ({k: tuple(v.shape) for k, v in x.items()} for x in (tensors, expected))
    if wrong := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{folder}: trained on another model: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, among them {name}: {found.get(name)} in the file, {wanted.get(name)} "
            "in this model."
        )
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{folder}: {name} holds NaN, infinity or no numbers: train it again.")


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


def count_rows(tensors: dict[str, torch.Tensor]) -> int:
    shape = tensors["embedding.weight"].shape if "embedding.weight" in tensors else ()
    return shape[0] if shape else 0


@torch.no_grad()
def read_prefix(folder: Path, files: list[Path], config: ChatGLMConfig) -> Prefix:
    """Return the prefix in weight files; its length and kind are read from the tensors."""
    if config.pre_seq_len is not None:
        raise ValueError(
            f"{folder}: the model already has a P-Tuning v2 prefix of {config.pre_seq_len} tokens: "
            "load it without the prefix."
        )
    tensors = read_tensors(*files)
    if others := sorted(key for key in tensors if not key.startswith(PREFIX_KEYS)):
        raise ValueError(
            f"{folder}: no adapter: {files[0].name} holds {others[0]} and not only {PREFIX_KEYS}*; "
            "load a whole model with --model."
        )
    tensors = {key.removeprefix(PREFIX_KEYS): value for key, value in tensors.items()}
    has_projection, length = "trans.0.weight" in tensors, count_rows(tensors)
    if not 1 <= length < config.seq_length:
        raise ValueError(
            f"{folder}: a prefix of {length} tokens: allowed are 1 to {config.seq_length - 1}."
        )
    sizes = {"pre_seq_len": length, "prefix_projection": has_projection}
    with torch.device("meta"):
        encoder = PrefixEncoder(ChatGLMConfig.from_dict({**config.to_dict(), **sizes}))
    check_tensors(folder, tensors, encoder.state_dict())
    tensors = {key: value.float() for key, value in tensors.items()}
    encoder.load_state_dict(tensors, assign=True)
    weight = encoder.embedding.weight
    return Prefix(encoder.trans(weight) if has_projection else weight)  # projected only once


def import_peft():
    """Import PEFT late: only a LoRA needs it, and the import takes seconds."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"a LoRA needs PEFT ({error}): {INSTALL_PEFT}") from error
    return peft


@dataclass
class Lora:
    """A LoRA (arXiv 2106.09685) with PEFT's config and tensor names."""

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
        return "quantized weights" if self.is_quantized else "offloaded weights"

    def inject(self, model: ChatGLMForConditionalGeneration):
        """Wrap the model's layers in PEFT's, whose tensors are still on the meta device."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*QuantizedLinear.*", UserWarning)
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
            return import_peft().LoraModel(model, self.config, "default", low_cpu_mem_usage=True)

    def add_to(self, model: ChatGLMForConditionalGeneration):
        is_training = model.training
        lora = self.inject(model)
        tensors = {key: value.to(model.dtype) for key, value in self.tensors.items()}
        import_peft().set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        place_tensors(model, tensors)
        if self.is_merged:
            lora.merge_and_unload(safe_merge=True)
        model.train(is_training).requires_grad_(False)  # turns their dropout off


def place_tensors(model: ChatGLMForConditionalGeneration, tensors: dict[str, torch.Tensor]):
    """Move a LoRA's tensors to the devices that compute their layers.

    PEFT leaves whole layers on the CPU, and moves the tensors of an offloaded weight to the meta
    device, where their data is lost.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device, set_module_tensor_to_device

    for path, layer in [*model.named_modules()]:
        original = getattr(layer, "original_module", getattr(layer, "base_layer", None))
        if original is None:
            continue
        if hasattr(layer, "modules_to_save") and next(original.parameters()).is_meta:
            # The hook would fetch the original's weight.
            remove_hook_from_module(layer.modules_to_save["default"], recurse=True)
        with align_module_device(original):  # fetches offloaded weights to find their device
            device = next(original.parameters()).device
        for name, parameter in [*layer.named_parameters()]:
            key = f"{path}.{name}".replace(".modules_to_save.default", "").replace(".default", "")
            if parameter.device != device and not name.startswith(("base_layer", "original")):
                set_module_tensor_to_device(layer, name, device, tensors[key])


# The config of a LoRA.


def module_names():
    return checked(
        "names of modules, such as query_key_value",
        lambda value: isinstance(value, str) or all(map(MODULE_NAME.fullmatch, value)),
        None,
    )


def layers():
    def is_allowed(value):
        return all(0 <= i < MAX_LAYERS for i in (value if isinstance(value, list) else [value]))

    return checked("the number of a layer or a list of them", is_allowed, None)


def numbers_by_module(low, high):
    return checked(
        f"numbers from {low} to {high} by names of modules",
        lambda value: all(low <= number <= high for number in value.values()),
        None,
    )


@strict
@dataclass
class LoraFields:
    """The fields of adapter_config.json that a LoRA is computed with; PEFT has the same names."""

    r: int = integer(1, MAX_RANK)
    lora_alpha: int | float = number(MIN_ALPHA, MAX_ALPHA)
    lora_dropout: int | float = number(0, 1, 0)
    target_modules: list[str] | str | None = module_names()
    exclude_modules: list[str] | str | None = module_names()
    modules_to_save: list[str] | None = module_names()
    layers_to_transform: list[int] | int | None = layers()
    layers_pattern: list[str] | None = module_names()
    rank_pattern: dict[str, int] | None = numbers_by_module(1, MAX_RANK)
    alpha_pattern: dict[str, int | float] | None = numbers_by_module(MIN_ALPHA, MAX_ALPHA)
    fan_in_fan_out: bool = False
    bias: str = choice("none", "all", "lora_only", default="none")
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True


def read_lora(folder: Path, config: ChatGLMConfig, is_quantized: bool, is_offloaded: bool) -> Lora:
    check_inside(folder, folder / PEFT_CONFIG)
    try:
        content = read_json(folder / PEFT_CONFIG)
        kind = content["peft_type"]
    except (ValueError, KeyError) as error:
        raise OSError(
            f"{folder}: {PEFT_CONFIG} is damaged: download it again ({one_line(error)})."
        ) from error
    if kind != "LORA":
        raise ValueError(
            f"{folder}: an adapter of PEFT's type {kind!s:.80}: only LORA and the P-Tuning v2 "
            "prefixes of the original's training can be loaded."
        )
    if not (files := [folder / name for name in PEFT_WEIGHTS if (folder / name).exists()]):
        raise OSError(f"{folder}: no {' or '.join(PEFT_WEIGHTS)}: download it again.")
    fields = read_fields(folder / PEFT_CONFIG, content)
    sizes = {**config.to_dict(), "quantization_bit": 0, "quantization_config": None}
    model = create_empty_model(ChatGLMConfig.from_dict(sizes))
    lora_config = create_lora_config(folder / PEFT_CONFIG, fields, [*dict(model.named_modules())])
    if is_quantized:
        register_quantized_layers(lora_config)
    tensors = {k.removeprefix("base_model.model."): v for k, v in read_tensors(*files[:1]).items()}
    lora = Lora(lora_config, tensors, is_quantized, is_offloaded)
    check_lora(folder, lora, model)
    return lora


def read_fields(path: Path, content: dict) -> dict:
    """Return the values for PEFT's config.

    Raises:
        ValueError: One is not allowed, or asks for what is not supported.
        ImportError: PEFT is not installed.
    """
    defaults = import_peft().LoraConfig().to_dict()
    fields = {**vars(LoraFields(r=8, lora_alpha=8)), **select_fields(LoraFields, content)}
    try:
        check_fields(LoraFields, fields)
        check_unsupported(fields, content, defaults)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return fields


def create_lora_config(path: Path, fields: dict, modules: list[str]):
    """Return PEFT's config.

    PEFT matches names of modules with regular expressions, which can take forever. They are matched
    here, with a time limit, and PEFT gets the names.

    Args:
        modules: The names of the model's modules.

    Raises:
        ValueError: A regular expression is wrong or takes too long.
    """
    try:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields[name], str) and fields[name] != "all-linear":
                fields[name] = [*find_matches(name, {fields[name]: True}, modules, "{}")]
        for name in ("rank_pattern", "alpha_pattern"):
            found = find_matches(name, fields[name] or {}, modules, r"(?:.*\.)?(?:{})")
            fields[name] = {re.escape(module): value for module, value in found.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with explain_peft(path.parent):
        return import_peft().LoraConfig(**fields | {"init_lora_weights": True}, inference_mode=True)


def check_unsupported(fields: dict, content: dict, defaults: dict):
    """Check that no field has a value that PEFT would use and this project does not.

    Raises:
        ValueError: One has.
    """
    if fields["init_lora_weights"] not in INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights is {fields['init_lora_weights']!r}, which changed the model's own "
            "weights: save it with PEFT's path_initial_model_for_weight_conversion."
        )
    for name in content.keys() - fields - UNUSED:
        if content[name] and content[name] != defaults.get(name):
            raise ValueError(
                f"{name} is {reprlib.repr(content[name])}: this kind of LoRA is not supported"
            )


def find_matches(field: str, patterns: dict, modules: list[str], form: str) -> dict:
    """Return the value of the first pattern that matches a module, for each module with one.

    Raises:
        ValueError: A pattern is no regular expression, or takes too long.
    """
    found, deadline = {}, time.monotonic() + MATCHING_S
    for pattern, value in patterns.items():
        try:
            matcher = regex.compile(form.format(pattern))
            for module in modules:
                left = max(deadline - time.monotonic(), 1e-3)
                if module not in found and matcher.fullmatch(module, timeout=left):
                    found[module] = value
        except (regex.error, RecursionError, TimeoutError) as error:
            raise ValueError(
                f"{field} is {pattern!r:.80}, which cannot be matched with the names of modules "
                f"({one_line(error)}): give a list of names, such as query_key_value"
            ) from error
    return found


def register_quantized_layers(lora_config):
    if not hasattr(lora_config, "_register_custom_module"):
        raise ImportError(f"this version of PEFT supports no quantized layers: {INSTALL_PEFT}")
    # PEFT's guide to custom models documents this method for unknown layers.
    lora_config._register_custom_module({QuantizedLinear: import_peft().tuners.lora.Linear})


@contextmanager
def explain_peft(folder: Path):
    """Turn PEFT's errors, which are of many kinds, into one line.

    Raises:
        ValueError: Instead of any error.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: trained on another model: {one_line(error)}") from error
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"{folder}: PEFT cannot use it with this model: {kind}: {one_line(error)}"
        ) from error


def check_lora(folder: Path, lora: Lora, model: ChatGLMForConditionalGeneration):
    """Check a LoRA by adding it to a model without data.

    Raises:
        ValueError: It is for another model, or cannot be computed beside the weights.
    """
    with explain_peft(folder):
        lora.inject(model)
        expected = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    check_tensors(folder, lora.tensors, expected)
    if not lora.is_merged and any(getattr(x, "lora_variant", None) for x in model.modules()):
        raise ValueError(
            f"{folder}: a variant of LoRA, such as DoRA, cannot be computed beside {lora.weights}: "
            "omit --quantize and --offload-folder."
        )
