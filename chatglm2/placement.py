"""Which device holds which part of a model: several GPUs, the CPU's memory, the disk.

A device map gives the name of each part its device: a GPU's number, "cuda:1", "cpu" or "disk".
accelerate moves the hidden states from one device to the next. Weights on the disk, or in the CPU's
memory beside a GPU, are moved to where they are used for each token.
"""

import argparse
import os
import re
from collections import Counter
from pathlib import Path

import torch

from .configuration_chatglm import ChatGLMConfig
from .hardware import get_free_memory, get_free_space, gigabytes
from .modeling_chatglm import ChatGLMForConditionalGeneration
from .quantization import ChatGLMQuantizationConfig
from .weights_chatglm import find_weight_files

MEMORY_MARGIN = 1.02  # factor: loading and the first rounds need more than the weights
ENDS = {  # parts on the first device: the ids come in there, and the logits go out
    "transformer.embedding.word_embeddings",
    "transformer.rotary_pos_emb",
    "transformer.encoder.final_layernorm",
    "transformer.output_layer",
}
PREFIX = "transformer.prefix_encoder"  # P-Tuning v2
LAYERS = "transformer.encoder.layers."
FIRST_GENERATION = r"(transformer\.(word_embeddings|layers(\.\d+)?|final_layernorm))(\.|$)"
WITHIN_LAYER = r"(transformer\.encoder\.layers\.\d+)\."


# Several GPUs.


def auto_configure_device_map(num_gpus: int, num_layers: int = 28) -> dict[str, int]:
    """Divide the layers evenly; the first GPU has two less, and all the rest of the model.

    Raises:
        ValueError: There are fewer layers than GPUs, or no GPU.
    """
    if not 1 <= num_gpus <= num_layers:
        raise ValueError(
            f"num_gpus is {num_gpus}, and the model has {num_layers} layers to divide: give a "
            f"number from 1 to {num_layers}."
        )
    device_map, gpu, used = dict.fromkeys(sorted(ENDS), 0), 0, 2
    for i in range(num_layers):
        is_full = used >= (num_layers + 2) / num_gpus
        if gpu < num_gpus - 1 and (is_full or num_layers - i < num_gpus - gpu):
            gpu, used = gpu + 1, 0
        device_map[f"{LAYERS}{i}"] = gpu
        used += 1
    return device_map


def create_device_map(config: ChatGLMConfig, num_gpus: int) -> dict[str, int]:
    """Return `auto_configure_device_map` for a model and its P-Tuning v2 prefix, if it has one."""
    device_map = auto_configure_device_map(num_gpus, config.num_layers)
    return device_map if config.pre_seq_len is None else {PREFIX: 0, **device_map}


def load_model_on_gpus(
    checkpoint_path: str | os.PathLike,
    num_gpus: int = 2,
    device_map: dict[str, int | str | torch.device] | None = None,
    **kwargs,
) -> ChatGLMForConditionalGeneration:
    """Load a model onto several GPUs, each tensor directly onto its own; for `generate` and chat.

    Args:
        device_map: The device of each part, instead of an even division.
        kwargs: Arguments of `from_pretrained`. The default dtype is float16, as in the original.

    Raises:
        OSError: There is no such checkpoint, or it is damaged.
        ValueError: There are too few GPUs or layers, or the map is wrong.
    """
    of_config = {k: v for k, v in kwargs.items() if k not in ("dtype", "quantization_config")}
    config = kwargs.get("config") or ChatGLMConfig.from_pretrained(checkpoint_path, **of_config)
    if device_map is None:
        device_map = create_device_map(config, num_gpus)
        check_gpu(num_gpus - 1, f"num_gpus is {num_gpus}")
    device_map = resolve_device_map(device_map, config)
    if "disk" in device_map.values() and kwargs.get("quantization_config") is not None:
        check_quantized(config)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", torch.float16))
    return ChatGLMForConditionalGeneration.from_pretrained(
        checkpoint_path, device_map=for_accelerate(device_map), dtype=dtype, **kwargs
    )


def for_accelerate(device_map: dict) -> dict:
    """Return a map as accelerate needs it.

    accelerate computes offloaded layers on the lowest GPU, and only `torch.device`s are sorted as
    numbers. Its reader of offloaded tensors accepts strings only.
    """
    if "disk" in device_map.values():
        return {part: str(device) for part, device in device_map.items()}
    return device_map


# A user's own device map.


def resolve_device_map(device_map: dict, config: ChatGLMConfig) -> dict[str, torch.device | str]:
    """Check a device map, and return the device of each part.

    Raises:
        ValueError: It names what the model does not have, leaves out a part or divides a layer;
            a device does not exist; or the embedding is on a device that cannot hold it.
    """
    if not isinstance(device_map, dict):
        raise ValueError(
            f"device_map is {device_map!r}: give a dictionary from parts to devices, or leave it "
            "out for an even division."
        )
    model = create_empty_model(config)
    # As the original: a map may name lm_head, which the model does not have.
    named = {name: device for name, device in device_map.items() if name != "lm_head"}
    check_names(named, model, config.num_layers)
    resolved = {}  # one entry for each part: accelerate allows no name within another
    for name, _ in model.named_parameters():
        resolved[get_part(name)] = resolve_device(name, find_device(named, name))
    embedding = resolved["transformer.embedding.word_embeddings"]
    has_gpu = any(isinstance(device, torch.device) for device in resolved.values())
    if embedding == "disk" or (embedding == "cpu" and has_gpu):
        raise ValueError(
            f"device_map puts transformer.embedding on {embedding!r}, but the ids are looked up "
            f"there: put it on {'a GPU' if has_gpu else 'cpu'}."
        )
    return resolved


def check_names(device_map: dict, model, num_layers: int):
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters()]} | ENDS
    parts = (
        f"the parts are transformer.embedding, {LAYERS}0 to {LAYERS}{num_layers - 1}, "
        "transformer.encoder.final_layernorm and transformer.output_layer"
    )
    for name in device_map:
        if match := re.match(FIRST_GENERATION, name):
            raise ValueError(
                f"device_map names {match[1]}, which is a name of the first ChatGLM-6B; in "
                f"ChatGLM2 {parts}: auto_configure_device_map makes such a map."
            )
        if name not in known:
            raise ValueError(f"device_map names {name!r}, which the model does not have: {parts}.")
        if match := re.match(WITHIN_LAYER, name):
            raise ValueError(
                f"device_map divides a layer ({name}), which adds its parts up: give the whole of "
                f"{match[1]} one device."
            )
    tensors = [name for name, _ in model.named_parameters()]
    missing = [name for name in tensors if find_device(device_map, name) is None]
    if missing:
        raise ValueError(
            f"device_map gives no device for {len(missing)} of the model's {len(tensors)} tensors, "
            f"the first is {missing[0]}: {parts}."
        )


def find_device(device_map: dict, name: str):
    """Return the device of the longest name in the map that a parameter's name begins with."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def resolve_device(name: str, device) -> torch.device | str:
    if device in ("cpu", "disk", torch.device("cpu")):
        return str(device)
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        device = f"cuda:{device}"
    if not re.fullmatch(r"cuda(:\d+)?", str(device)):
        raise ValueError(
            f"device_map puts {name or 'the model'} on {device!r}: give a GPU's number, 'cuda:N', "
            "'cpu' or 'disk'."
        )
    resolved = torch.device("cuda", torch.device(device).index or 0)
    check_gpu(resolved.index, f"device_map puts {name or 'the model'} on {resolved}")
    return resolved


def check_gpu(index: int, what: str):
    """Check that there is a GPU of this number; `what` begins the error message.

    Raises:
        ValueError: There is none.
    """
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"{what}, but PyTorch {torch.__version__} finds no CUDA GPU here.")
    if index >= count:
        numbers = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"{what}, but the GPUs here are {numbers}.")


def get_part(name: str) -> str:
    """Return the part of the model, such as a layer, that a parameter belongs to."""
    if name.startswith(LAYERS):
        return ".".join(name.split(".")[:4])
    return PREFIX if name.startswith(f"{PREFIX}.") else name.rpartition(".")[0]


# Sizes, and offloading what does not fit.


def create_empty_model(
    config: ChatGLMConfig, quantization: ChatGLMQuantizationConfig | None = None
) -> ChatGLMForConditionalGeneration:
    """Return a model without data, quantized as its config says or as requested."""
    if quantization is not None:
        fields = {"quantization_config": quantization.to_dict()}
        config = ChatGLMConfig.from_dict(config.to_dict() | fields)
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(config)


def measure_parts(
    config: ChatGLMConfig, dtype: torch.dtype, quantization: ChatGLMQuantizationConfig | None
) -> dict[str, int]:
    """Return the bytes of each part of a loaded model, from the shapes alone."""
    sizes = Counter()
    for name, parameter in create_empty_model(config, quantization).to(dtype).named_parameters():
        sizes[get_part(name)] += parameter.nbytes
    return sizes


def count_weight_bytes(
    config: ChatGLMConfig, dtype: torch.dtype, quantization: ChatGLMQuantizationConfig | None = None
) -> int:
    return measure_parts(config, dtype, quantization).total()


def count_bytes(device_map: dict, sizes: dict[str, int]) -> Counter:
    """Return the bytes that each device of a map holds."""
    totals = Counter()
    for part, size in sizes.items():
        totals[find_device(device_map, part)] += size
    return totals


def plan_offload(sizes: dict[str, int], free: dict) -> dict:
    """Fill one device after the other, and put the remaining layers on the disk.

    Space for two layers stays free on each device: for an offloaded layer, and for caches.

    Args:
        sizes: Bytes of each part, from `measure_parts`.
        free: Bytes that each device can hold, in order; `None` is no limit.

    Returns:
        A device map.

    Raises:
        ValueError: The first device cannot even hold the ends of the model.
    """
    layers = {part: size for part, size in sizes.items() if part.startswith(LAYERS)}
    ends = {part: size for part, size in sizes.items() if part not in layers}
    reserve = 2 * max(layers.values())
    space = {d: float("inf") if n is None else n - reserve for d, n in free.items()}
    first = next(iter(free))
    space[first] -= sum(ends.values())
    if space[first] < 0:
        raise ValueError(
            f"{gigabytes(free[first])} are free on {first}, too little even for the embedding, the "
            "output layer and two layers: use --quantize 4 if it is not INT4 yet, or a machine "
            "with more memory."
        )
    device_map, devices = dict.fromkeys(ends, first), [*space]
    for part, size in layers.items():
        while devices and space[devices[0]] < size:
            devices.pop(0)
        device_map[part] = devices[0] if devices else "disk"
        if devices:
            space[devices[0]] -= size
    return device_map


def describe(device_map: dict) -> str:
    """Return how many layers are where, in words."""
    layers = Counter(device for part, device in device_map.items() if part.startswith(LAYERS))
    places = {"cpu": "in the CPU's memory", "disk": "on the disk"}
    return "layers: " + ", ".join(f"{n} {places.get(d, f'on {d}')}" for d, n in layers.items())


def place_model(
    args: argparse.Namespace,
    config: ChatGLMConfig,
    quantization: ChatGLMQuantizationConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    source: str | Path,
) -> tuple[dict, str]:
    """Divide a model as `--num-gpus` and `--offload-folder` request.

    Returns:
        The arguments of `from_pretrained` (none if `device` holds all), and a description.

    Raises:
        ValueError: The devices are too small, or there are fewer GPUs or layers than requested.
    """
    if args.num_gpus == 1 and args.offload_folder is None:
        return {}, ""
    targets = ["cpu" if device.type == "cpu" else device]
    if args.num_gpus > 1:
        if args.device not in ("auto", "cuda"):
            raise ValueError(
                f"--num-gpus uses the GPUs from cuda:0 on: leave out --device {args.device}."
            )
        check_gpu(args.num_gpus - 1, f"--num-gpus is {args.num_gpus}")
        targets = [torch.device("cuda", i) for i in range(args.num_gpus)]
    numbers = create_device_map(config, args.num_gpus)
    device_map = {part: targets[number] for part, number in numbers.items()}
    sizes = measure_parts(config, dtype, quantization)
    needed = {d: n * MEMORY_MARGIN for d, n in count_bytes(device_map, sizes).items()}
    free = {target: get_free_memory(torch.device(target)) for target in targets}
    small = [target for target, n in free.items() if n is not None and needed[target] > n]
    if not small:
        return {"device_map": device_map} if args.num_gpus > 1 else {}, describe(device_map)
    if args.offload_folder is None:
        raise ValueError(
            f"its part on {small[0]} needs {gigabytes(needed[small[0]])}, "
            f"{gigabytes(free[small[0]])} free: use more GPUs (--num-gpus), or --offload-folder "
            "FOLDER, or --quantize 4 if it is not INT4 yet."
        )
    if device.type == "cuda":  # on a Mac, GPU and CPU share the memory
        free["cpu"] = get_free_memory(torch.device("cpu"))
    return offload(plan_offload(sizes, free), sizes, args, config, quantization, source)


def offload(device_map, sizes, args, config, quantization, source) -> tuple[dict, str]:
    """Check that a model can be loaded by a map of `plan_offload`; return as `place_model`."""
    folder = Path(args.offload_folder)
    if folder.is_file():
        raise ValueError(f"--offload-folder {folder} is a file: name a folder.")
    stored = count_bytes(device_map, sizes)
    if stored["disk"]:
        if quantization is not None:
            check_quantized(config)
        check_space(folder, stored["disk"], source)
    moved = sum(stored[place] for place in {"cpu", "disk"} - {next(iter(device_map.values()))})
    where = f"{describe(device_map)} (slow: each token moves {gigabytes(moved)})"
    return {"device_map": for_accelerate(device_map), "offload_folder": folder}, where


def check_quantized(config: ChatGLMConfig):
    """Check that a model with layers on the disk need not be quantized while loading.

    Raises:
        ValueError: It has to be, but layers on the disk are read as they were saved.
    """
    if not config.quantization_bit:
        raise ValueError(
            "layers on the disk cannot be quantized while loading: load a checkpoint that was "
            "saved quantized, or leave the quantization out."
        )


def check_space(folder: Path, needed: int, source: str | Path):
    """Check that the disk can hold copies of the offloaded layers.

    Only .bin files are copied, safetensors are read in place. A model that is still to be
    downloaded is not checked.

    Raises:
        ValueError: The disk has too little space.
    """
    is_copied = any(file.suffix == ".bin" for file in find_weight_files(Path(source)))
    free = get_free_space(folder)
    if is_copied and needed > free:
        raise ValueError(
            f"{gigabytes(needed)} have to be copied to --offload-folder {folder}, "
            f"{gigabytes(free)} free: name a folder on another disk."
        )
