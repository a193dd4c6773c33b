"""What every script shares: the model's arguments, and loading it.

The only place that chooses device and dtype. Whatever a user can put right ends in a `SystemExit`
with one line. No code of a checkpoint folder is ever executed.
"""

import argparse
import os
import re
import sys

import torch
from huggingface_hub.errors import HTTPError

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2.adapters import read_adapter
from chatglm2.checkpoint import check_disk, locate_checkpoint, read_config
from chatglm2.command_line import number, one_line
from chatglm2.hardware import choose_threads, get_free_memory, gigabytes
from chatglm2.placement import (
    BLOCK,
    HEAD,
    MEMORY_MARGIN,
    PREFIX,
    check_gpu,
    check_quantized,
    for_accelerate,
    measure_parts,
    place_model,
    resolve_device_map,
)
from chatglm2.quantization import ChatGLMQuantizationConfig, get_quantization, prepare_layers

DEFAULT_MODEL = "THUDM/chatglm2-6b"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class StoreOnce(argparse.Action):
    """Refuses an argument that is given twice, where somebody could mean both values."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice: a model takes one")
        setattr(namespace, self.dest, values)


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add what `load_model` reads."""
    parser.add_argument(
        "--model",
        default=os.environ.get("CHATGLM_MODEL") or DEFAULT_MODEL,
        help="checkpoint folder or hub name (default: $CHATGLM_MODEL, else " + DEFAULT_MODEL + ")",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto (default): the checkpoint's own on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "float16", "bfloat16"],
        help="in which keys and values are kept (default: as the model computes)",
    )
    parser.add_argument(
        "--quantize",
        type=int,
        choices=[4, 8],
        help="round the weights to so many bits while loading (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--quantize-output",
        action="store_true",
        help="of a quantized model, round the output layer too, to INT8 (default: as in the "
        "checkpoint; the official ones have it in float16)",
    )
    parser.add_argument(
        "--exact-prefill",
        action="store_true",
        help="multiply prompts too by exact activations, not ones rounded to int8 (only the C "
        "kernels for quantized models on a CPU round them; answers are always exact)",
    )
    parser.add_argument(
        "--num-gpus",
        type=number(int, 1),
        default=1,
        help="divide the model over so many GPUs (default: 1)",
    )
    parser.add_argument(
        "--offload-folder",
        help="let the CPU's memory, then the disk hold what the GPU cannot; .bin files are copied "
        "into this folder (default: a model that does not fit is refused)",
    )
    parser.add_argument(
        "--threads",
        type=number(int, 1),
        help="CPU threads (default: $OMP_NUM_THREADS, else the physical cores that this process "
        "may use)",
    )
    parser.add_argument(
        "--adapter",
        action=StoreOnce,
        metavar="FOLDER",
        help="a LoRA (PEFT) or a P-Tuning v2 prefix that was trained on the model",
    )


def load_model(args: argparse.Namespace):
    """Load what `add_model_arguments` describes; say in one line on stderr where and how.

    Returns:
        Tokenizer and model.

    Raises:
        SystemExit: There is no such checkpoint, it is damaged or of another kind, the device is
            absent, or memory or disk is too small.
    """
    if threads := args.threads or choose_threads():
        torch.set_num_threads(threads)
    try:
        folder, hub_info = locate_checkpoint(args.model, args.revision)
        source = args.model if folder is None else folder
        revision = {} if hub_info is None else {"revision": args.revision or "main"}
        config = read_config(source, **revision)
        bits = choose_bits(args.model, args.quantize, config)
        output_bits = choose_output_bits(args.quantize_output, bits, config)
        device, dtype, reason = choose_device_and_dtype(args.device, args.dtype, config.dtype)
        if args.num_gpus > 1 and args.device not in ("auto", "cuda"):
            raise SystemExit(
                f"--num-gpus takes the GPUs from cuda:0 on: leave out --device {args.device}."
            )
        placement = {}
        if args.num_gpus > 1 or args.offload_folder is not None:
            numbers = create_device_map(config, args.num_gpus)
            sizes = measure_parts(config, dtype, bits, output_bits)
            placement, where = place_model(
                config, numbers, sizes, bits, device, args.offload_folder, source
            )
            reason += f", {where}"
        adapter = choose_adapter(args.adapter, config, bits, "offload_folder" in placement)
        precision = name_of(dtype, bits, output_bits)
        print(f"{args.model}: {device}, {precision}: {reason}", file=sys.stderr)
        if not placement:
            check_memory(args.model, config, device, dtype, bits, output_bits)
        if hub_info is not None:
            check_disk(args.model, hub_info)
        tokenizer = ChatGLMTokenizer.from_pretrained(source, **revision)
        model = load_weights(
            source, config, device, dtype, bits, output_bits, adapter, **revision, **placement
        )
    except (OSError, ValueError, HTTPError, RuntimeError) as error:
        raise SystemExit(f"{args.model}: {one_line(error)}") from error
    model.base_model.exact_prefill = args.exact_prefill
    model.base_model.cache_dtype = DTYPES.get(args.kv_cache_dtype)
    return tokenizer, model


def load_weights(
    source,
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    output_bits: int | None = None,
    adapter=None,
    **options,
):
    """Load the model, quantized to `bits` (0: not), the output layer to `output_bits`.

    `adapter` is what `choose_adapter` returned.

    A quantized one is loaded in the checkpoint's dtype: levels and scales are then the official
    ones, and on a CPU embedding and output layer stay mapped from the file. But blocks on the disk
    cannot be converted later.

    Args:
        options: Of `from_pretrained`: revision, device_map, offload_folder.
    """
    is_convertible = bits and "offload_folder" not in options
    quantization = {}
    if bits and not config.quantization_bit:
        quantization = {"quantization_config": ChatGLMQuantizationConfig(bits=bits)}
    model, loading = ChatGLMForConditionalGeneration.from_pretrained(
        source,
        config=config,
        dtype=(config.dtype or torch.float16) if is_convertible else dtype,
        device=None if device.type == "cpu" else device,
        ignore_mismatched_sizes=True,  # refused below, with a tensor's name
        output_loading_info=True,
        **quantization,
        **options,
    )
    unusable = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    unusable |= {key for key in loading["unexpected_keys"] if key.endswith("weight_scale")}
    if unusable:
        raise SystemExit(
            f"{source}: the weights do not belong to config.json: {len(unusable)} tensors are "
            f"missing, unknown or of another shape, among them {min(unusable)}; download both "
            "again."
        )
    if output_bits:
        model.quantize(bits, output_bits=output_bits)
    if is_convertible:
        model = model.to(dtype)
    if adapter:
        adapter.add_to(model)
    if bits:  # it tells which backend serves, or why none can
        prepare_layers(model)
    return model


def name_of(dtype: torch.dtype, bits=0, output_bits: int | None = None) -> str:
    name = str(dtype).removeprefix("torch.") + (f" with INT{bits} weights" if bits else "")
    return name + (f", INT{output_bits} output layer" if output_bits else "")


def name_precision(model) -> str:
    """Return dtype and quantization of a loaded model."""
    if quantization := get_quantization(model.config):
        return name_of(model.dtype, quantization.bits, quantization.output_bits)
    return name_of(model.dtype)


def describe(name: str, model) -> str:
    """Return a line with the model's name, its device and precision."""
    return f"{name}, {model.device}, {name_precision(model)}"


# Where and how: quantization, device, dtype, memory, disk.


def choose_bits(model: str, wanted: int | None, config: ChatGLMConfig) -> int:
    """Return the bits of the weights: the checkpoint's, else what was asked for, else 0.

    Raises:
        SystemExit: The checkpoint is quantized to other bits than was asked for.
        ValueError: It is quantized by another library.
    """
    present = get_quantization(config)
    if present is None:
        return wanted or 0
    if wanted not in (None, present.bits):
        raise SystemExit(
            f"--quantize {wanted}: {model} is quantized to {present.bits} bits already: leave it "
            f"out, or take a checkpoint that is not quantized ({DEFAULT_MODEL})."
        )
    return present.bits


def choose_output_bits(wanted: bool, bits: int, config: ChatGLMConfig) -> int | None:
    """Return the bits of the output layer: 8 if wanted, else the checkpoint's; `None` is float.

    Raises:
        SystemExit: It is wanted, but the rest is not quantized.
    """
    if wanted and not bits:
        raise SystemExit(
            "--quantize-output rounds the output layer of a quantized model: add --quantize 4 or "
            "--quantize 8."
        )
    present = get_quantization(config)
    return 8 if wanted else present and present.output_bits


def choose_adapter(folder: str | None, config: ChatGLMConfig, bits: int, is_offloaded: bool):
    """Read the adapter before the weights, which take longer; return `None` if none is wanted."""
    if folder is None:
        return None
    try:
        adapter = read_adapter(folder, config, bits > 0, is_offloaded)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"--adapter {one_line(error)}") from error
    print(f"{folder}: {adapter}", file=sys.stderr)
    return adapter


def choose_device_and_dtype(
    device: str, dtype: str, checkpoint_dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype, str]:
    """Resolve `--device` and `--dtype`; the last item says why."""
    chosen, reason = choose_device(device)
    if dtype == "bfloat16" and not has_bfloat16(chosen):
        raise SystemExit(f"--dtype bfloat16: {chosen} has none: take --dtype float16.")
    if dtype != "auto":
        reason += f", {dtype} was asked for"
        if chosen.type == "cpu" and dtype == "float16":
            reason += " (slow on a CPU: float32 or bfloat16 is faster)"
        return chosen, DTYPES[dtype], reason
    if chosen.type == "cpu":
        return chosen, torch.float32, f"{reason}, float32 is exact and fast on a CPU"
    own = checkpoint_dtype or torch.float16
    if own == torch.bfloat16 and not has_bfloat16(chosen):
        return chosen, torch.float16, f"{reason}, float16 because the GPU has no bfloat16"
    return chosen, own, f"{reason}, {name_of(own)} is the checkpoint's own"


def has_bfloat16(device: torch.device) -> bool:
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def choose_device(device: str) -> tuple[torch.device, str]:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0"), "there is a CUDA GPU"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "there is an Apple GPU"
        return torch.device("cpu"), "no GPU was found"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise SystemExit(f"--device {device}: allowed are auto, cpu, cuda, cuda:N and mps.")
    chosen = torch.device("cuda:0" if device == "cuda" else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        cause = "finds no CUDA GPU" if torch.version.cuda else "was built without CUDA"
        raise SystemExit(
            f"--device {device}: the installed PyTorch {torch.__version__} {cause}: take "
            "--device cpu, or install PyTorch's CUDA build and the GPU's driver."
        )
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise SystemExit(
            f"--device {device}: the last GPU here is cuda:{torch.cuda.device_count() - 1}."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise SystemExit(f"--device {device}: PyTorch finds no Apple GPU here: take --device cpu.")
    return chosen, "the device was asked for"


def count_weight_bytes(
    config: ChatGLMConfig, dtype: torch.dtype, bits: int, output_bits: int | None = None
) -> int:
    """Return the size of a loaded model, from its shapes alone."""
    return sum(measure_parts(config, dtype, bits, output_bits).values())


def check_memory(
    model: str,
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    output_bits: int | None = None,
):
    """Stop before loading what cannot fit; where free memory cannot be read, go on."""

    def need(dtype, bits):
        return count_weight_bytes(config, dtype, bits, output_bits) * MEMORY_MARGIN

    free, needed = get_free_memory(device), need(dtype, bits)
    if free is None or needed <= free:
        return
    smaller = {}
    if dtype == torch.float32 and not bits:
        smaller["--dtype bfloat16"] = need(torch.bfloat16, 0)
    if bits != 4 and not config.quantization_bit:
        smaller["--quantize 4"] = need(dtype, 4)
    fitting = {option: size for option, size in smaller.items() if size <= free}
    steps = [f"{option} (needs {gigabytes(size)})" for option, size in fitting.items()]
    steps += ["a machine with more memory"]
    if not bits or config.quantization_bit:
        steps += ["--offload-folder FOLDER (the disk holds the rest: slow)"]
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        steps += [f"--num-gpus (there are {torch.cuda.device_count()})"]
    steps += ["the bundled checkpoint (--model resources/chatglm2-tiny)"]
    raise SystemExit(
        f"{model} needs {gigabytes(needed)} for {name_of(dtype, bits, output_bits)} on {device}, "
        f"{gigabytes(free)} free: take {', or '.join(steps)}."
    )


# Several GPUs.


def auto_configure_device_map(num_gpus: int, num_layers: int = 28) -> dict[str, int]:
    """Divide the blocks evenly; the first GPU has two less, and all the rest of the model.

    Raises:
        ValueError: There are fewer blocks than GPUs, or no GPU.
    """
    if not 1 <= num_gpus <= num_layers:
        raise ValueError(
            f"num_gpus is {num_gpus}, and the model has {num_layers} blocks to divide: give a "
            f"number from 1 to {num_layers}."
        )
    device_map, gpu, used = dict.fromkeys(sorted(HEAD), 0), 0, 2
    for i in range(num_layers):
        is_full = used >= (num_layers + 2) / num_gpus
        if gpu < num_gpus - 1 and (is_full or num_layers - i < num_gpus - gpu):
            gpu, used = gpu + 1, 0
        device_map[f"{BLOCK}{i}"] = gpu
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
    """Load a model onto several GPUs, each tensor straight onto its own; for `generate` and chat.

    Args:
        device_map: Which part goes where, instead of an even division.
        kwargs: Of `from_pretrained`. Without a `dtype` it is float16, as in the original.

    Raises:
        OSError: There is no such checkpoint, or it is damaged.
        ValueError: There are fewer GPUs or blocks than that, or the map is wrong; in one line.
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
