"""Which device holds which part of a model: several GPUs, the CPU's memory, the disk.

A device map gives each part's name its device: a GPU's number, "cuda:1", "cpu" or "disk".
accelerate moves what is computed from one to the next. What is on the CPU beside GPUs, or on the
disk, is moved to a GPU (or into memory) each time it is used.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from .configuration_chatglm import ChatGLMConfig
from .hardware import get_free_memory, get_free_space, gigabytes
from .modeling_chatglm import ChatGLMForConditionalGeneration, find_weight_files
from .quantization import ChatGLMQuantizationConfig, get_quantization

MEMORY_MARGIN = 1.02  # what loading and the first rounds need beside the weights
HEAD = {  # what the first device holds, beside blocks: where the ids come in and the scores go out
    "transformer.embedding.word_embeddings",
    "transformer.rotary_pos_emb",
    "transformer.encoder.final_layernorm",
    "transformer.output_layer",
}
PREFIX = "transformer.prefix_encoder"  # of P-Tuning v2
BLOCK = "transformer.encoder.layers."
FIRST_GENERATION = r"(transformer\.(word_embeddings|layers(\.\d+)?|final_layernorm))(\.|$)"
WITHIN_BLOCK = r"(transformer\.encoder\.layers\.\d+)\."


def for_accelerate(device_map: dict) -> dict:
    """Return a map as accelerate needs it.

    It computes with blocks from elsewhere on the first GPU of a set: `torch.device`s are in order
    there, strings are not. But what reads tensors from the disk knows strings only.
    """
    if "disk" in device_map.values():
        return {part: str(device) for part, device in device_map.items()}
    return device_map


def create_empty_model(config: ChatGLMConfig) -> ChatGLMForConditionalGeneration:
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(config)


def resolve_device_map(device_map: dict, config: ChatGLMConfig) -> dict[str, torch.device | str]:
    """Check a device map, and return the device of each part.

    Raises:
        ValueError: It names what the model does not have, leaves out a part or divides a block;
            there is no such device; or the embedding is where no ids can be.
    """
    if not isinstance(device_map, dict):
        raise ValueError(
            f"device_map is {device_map!r}: give a dictionary from parts to devices, or leave it "
            "out for an even division."
        )
    model = create_empty_model(config)
    named = {name: device for name, device in device_map.items() if name != "lm_head"}  # original's
    check_names(named, model, config.num_layers)
    resolved = {}  # part by part: accelerate wants no name within another
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
    known = {name for name, _ in [*model.named_modules(), *model.named_parameters()]} | HEAD
    parts = (
        f"the parts are transformer.embedding, {BLOCK}0 to {BLOCK}{num_layers - 1}, "
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
        if match := re.match(WITHIN_BLOCK, name):
            raise ValueError(
                f"device_map divides a block ({name}), which adds its parts up: give the whole of "
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
    """Return the device of a parameter: that of the longest name in the map that it begins with."""
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
    """Check that there is a GPU of this number.

    Raises:
        ValueError: There is not; `what` wants it.
    """
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"{what}, but PyTorch {torch.__version__} finds no CUDA GPU here.")
    if index >= count:
        numbers = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"{what}, but the GPUs here are {numbers}.")


def get_part(name: str) -> str:
    """Return the part that a parameter belongs to: a block, or what stands beside the blocks."""
    if name.startswith(BLOCK):
        return ".".join(name.split(".")[:4])
    return PREFIX if name.startswith(f"{PREFIX}.") else name.rpartition(".")[0]


def measure_parts(
    config: ChatGLMConfig, dtype: torch.dtype, bits: int, output_bits: int | None = None
) -> dict[str, int]:
    """Return the bytes of each part, quantized to `bits` (0: not), from its shapes alone."""
    if bits:
        quantization = get_quantization(config) or ChatGLMQuantizationConfig(bits=bits)
        fields = replace(quantization, output_bits=output_bits).to_dict()
        config = ChatGLMConfig.from_dict({**config.to_dict(), "quantization_config": fields})
    sizes = {}
    for name, parameter in create_empty_model(config).to(dtype).named_parameters():
        part = get_part(name)
        sizes[part] = sizes.get(part, 0) + parameter.numel() * parameter.element_size()
    return sizes


def count_bytes(device_map: dict, sizes: dict[str, int]) -> dict:
    """Return how much each device of a map holds."""
    totals = {}
    for part, size in sizes.items():
        device = find_device(device_map, part)
        totals[device] = totals.get(device, 0) + size
    return totals


def plan_offload(sizes: dict[str, int], free: dict) -> dict:
    """Fill one device after the other, and put the rest of the blocks on the disk.

    Room for two blocks is left on each: for one that comes and goes, and for caches.

    Args:
        sizes: Bytes of each part, from `measure_parts`.
        free: Bytes that each device can hold, in order; `None` is no limit.

    Returns:
        A device map.

    Raises:
        ValueError: The first device cannot even hold the ends of the model.
    """
    blocks = {part: size for part, size in sizes.items() if part.startswith(BLOCK)}
    head = {part: size for part, size in sizes.items() if part not in blocks}
    reserve = 2 * max(blocks.values())
    room = {d: float("inf") if n is None else n - reserve for d, n in free.items()}
    first = next(iter(free))
    if sum(head.values()) > room[first]:
        raise ValueError(
            f"{gigabytes(free[first])} are free on {first}, too little even for the embedding, the "
            "output layer and two blocks: take --quantize 4 if it is not INT4 yet, or a machine "
            "with more memory."
        )
    room[first] -= sum(head.values())
    device_map, devices = dict.fromkeys(head, first), [*room]
    for part, size in blocks.items():
        while devices and room[devices[0]] < size:
            devices.pop(0)
        device_map[part] = devices[0] if devices else "disk"
        if devices:
            room[devices[0]] -= size
    return device_map


def describe(device_map: dict) -> str:
    """Tell in words how many blocks are where."""
    blocks = Counter(device for part, device in device_map.items() if part.startswith(BLOCK))
    places = {"cpu": "in the CPU's memory", "disk": "on the disk"}
    return "blocks: " + ", ".join(f"{n} {places.get(d, f'on {d}')}" for d, n in blocks.items())


def place_model(
    config: ChatGLMConfig,
    numbers: dict[str, int],
    sizes: dict[str, int],
    bits: int,
    device: torch.device,
    offload_folder: str | None,
    source,
) -> tuple[dict, str]:
    """Divide a model over several GPUs, and what does not fit there over memory and disk.

    Args:
        numbers: The GPU of each part, when each of them can hold its share.
        sizes: From `measure_parts`.
        bits: Of its weights, once they are loaded.
        source: Folder or hub name of the checkpoint.

    Returns:
        What `from_pretrained` has to know of it (nothing if `device` holds all), and words.

    Raises:
        ValueError: They are too small, or there are fewer GPUs or blocks.
    """
    num_gpus = 1 + max(numbers.values())
    targets = ["cpu" if device.type == "cpu" else device]
    if num_gpus > 1:
        check_gpu(num_gpus - 1, f"--num-gpus is {num_gpus}")
        targets = [torch.device("cuda", i) for i in range(num_gpus)]
    device_map = {part: targets[number] for part, number in numbers.items()}
    needed = {d: n * MEMORY_MARGIN for d, n in count_bytes(device_map, sizes).items()}
    free = {target: get_free_memory(torch.device(target)) for target in targets}
    small = [target for target, n in free.items() if n is not None and needed[target] > n]
    if not small:
        return {"device_map": device_map} if num_gpus > 1 else {}, describe(device_map)
    if offload_folder is None:
        raise ValueError(
            f"its part on {small[0]} needs {gigabytes(needed[small[0]])}, "
            f"{gigabytes(free[small[0]])} free: take more GPUs (--num-gpus), or --offload-folder "
            "FOLDER, or --quantize 4 if it is not INT4 yet."
        )
    if device.type == "cuda":  # on a Mac, GPU and CPU share the memory
        free["cpu"] = get_free_memory(torch.device("cpu"))
    if Path(offload_folder).is_file():
        raise ValueError(f"--offload-folder {offload_folder} is a file: name a folder.")
    device_map = plan_offload(sizes, free)
    stored = count_bytes(device_map, sizes)
    if "disk" in stored:
        if bits:
            check_quantized(config)
        check_space(offload_folder, stored["disk"], source)
    moved = sum(stored.get(place, 0) for place in {"cpu", "disk"} - {targets[0]})
    where = f"{describe(device_map)} (slow: each token moves {gigabytes(moved)})"
    return {"device_map": for_accelerate(device_map), "offload_folder": offload_folder}, where


def check_quantized(config: ChatGLMConfig):
    """Check that a model whose blocks go to the disk need not be quantized while loading.

    Raises:
        ValueError: It has to be; what is on the disk is read as it was saved.
    """
    if not config.quantization_bit:
        raise ValueError(
            "blocks on the disk cannot be quantized while loading: load a checkpoint that was "
            "saved quantized, or leave the quantization out."
        )


def check_space(offload_folder: str, needed: int, source):
    """Check that blocks can be copied to the disk; safetensors are not, they are read in place.

    Of a model that is still to be downloaded it is not known.

    Raises:
        ValueError: They cannot.
    """
    is_copied = any(file.suffix == ".bin" for file in find_weight_files(Path(source)))
    free = get_free_space(Path(offload_folder))
    if is_copied and needed > free:
        raise ValueError(
            f"{gigabytes(needed)} have to be copied to --offload-folder {offload_folder}, "
            f"{gigabytes(free)} free: name a folder on another disk."
        )
