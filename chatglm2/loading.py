"""Load a model as the command line describes it: device, dtype, quantization, memory, adapter.

The only place that chooses device and dtype. A mistake that the user can correct raises
`SystemExit` with one line. The code of a checkpoint folder is never executed.
"""

import argparse
import re
import sys
from dataclasses import replace

import torch
from transformers.utils import logging

from .adapters import read_adapter
from .checkpoint import download_weights, locate_descriptions
from .configuration_chatglm import ChatGLMConfig
from .errors import exit_on_error
from .hardware import choose_threads, get_free_memory, gigabytes
from .json_files import check_tokenizer_files, read_config, read_generation_config
from .modeling_chatglm import ChatGLMForConditionalGeneration
from .placement import MEMORY_MARGIN, count_weight_bytes, place_model
from .quantization import ChatGLMQuantizationConfig, get_quantization, prepare_layers
from .recognition import check_shapes
from .tokenization_chatglm import ChatGLMTokenizer

TOKENS_PER_S = {4: 9.1, 8: 6.6}  # of ChatGLM2-6B on two CPU cores: docs/performance.md
LARGE = 3e9  # bytes: the user of a CPU should know memory and speed
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(args: argparse.Namespace):
    """Load the model that `utils.add_model_arguments` describes.

    Prints one line on stderr: device, precision, and the reason for both.

    Returns:
        Tokenizer and model.

    Raises:
        SystemExit: The checkpoint is missing, damaged or of another kind, the device is absent, or
            memory or disk is too small.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    threads = args.threads or choose_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    with exit_on_error(f"{args.model}: "):
        folder, hub_info = locate_descriptions(args.model, args.revision)
        config, generation_config = read_config(folder), read_generation_config(folder)
        check_tokenizer_files(folder)
        quantization = choose_quantization(args, config)
        device, dtype, reason = choose_device_and_dtype(args.device, args.dtype, config.dtype)
        if hub_info is None:
            check_shapes(folder, config)
        placement, where = place_model(args, config, quantization, device, dtype, folder)
        adapter = choose_adapter(
            args.adapter, config, quantization, is_offloaded="offload_folder" in placement
        )
        reason = ", ".join(filter(None, (reason, where)))
        print(f"{args.model}: {device}, {name_of(dtype, quantization)}: {reason}", file=sys.stderr)
        if not placement:
            check_memory(args.model, config, device, dtype, quantization)
            if advice := describe_cost(config, device, quantization, args.dtype):
                print(advice, file=sys.stderr)
        if hub_info is not None:
            folder = download_weights(args.model, args.revision, hub_info)
            check_shapes(folder, config)
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
        check_vocabulary(args.model, tokenizer, config.padded_vocab_size)
        model = load_weights(
            folder,
            config,
            device,
            dtype,
            quantization,
            adapter,
            generation_config=generation_config,
            **placement,
        )
    model.base_model.cache_dtype = DTYPES.get(args.kv_cache_dtype)
    return tokenizer, model


def check_vocabulary(name: str, tokenizer: ChatGLMTokenizer, num_rows: int):
    """Check that the model has a row for each token.

    Raises:
        SystemExit: It has not.
    """
    added = tokenizer.get_added_vocab()
    if (last := max([tokenizer.vocab_size - 1, *added.values()])) >= num_rows:
        file = "tokenizer_config.json" if last in added.values() else "tokenizer.model"
        raise SystemExit(
            f"{name}: {file} has tokens with ids up to {last}, and padded_vocab_size in "
            f"config.json is {num_rows}: use the tokenizer of this model; if tokens were added in "
            "training, the model that resize_token_embeddings gave."
        )


def load_weights(
    source,
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None,
    adapter=None,
    **options,
) -> ChatGLMForConditionalGeneration:
    """Load the model, quantize it if its checkpoint is not, and add the adapter.

    `check_shapes` has compared the weights with the config.
    A quantized model is loaded in the checkpoint's dtype: levels and scales are then the official
    ones, and on a CPU embedding and output layer stay mapped from the file. Layers on the disk
    cannot be converted later, so an offloaded model is loaded in `dtype`.

    Args:
        adapter: From `choose_adapter`.
        options: Arguments of `from_pretrained`: device_map, offload_folder, generation_config.
    """
    is_convertible = quantization is not None and "offload_folder" not in options
    if quantization is not None and not config.quantization_bit:
        options["quantization_config"] = quantization
    model = ChatGLMForConditionalGeneration.from_pretrained(
        source,
        config=config,
        dtype=(config.dtype or torch.float16) if is_convertible else dtype,
        device=None if device.type == "cpu" else device,
        **options,
    )
    if quantization is not None:  # the checkpoint's output layer may still be of 16 bits
        model.quantize(quantization.bits, quantization.group_size, quantization.output_bits)
    if is_convertible:
        model = model.to(dtype)
    if adapter is not None:
        adapter.add_to(model)
    if quantization is not None:
        prepare_layers(model)  # prints the backend, or why a faster one cannot be used
    return model


def name_of(dtype: torch.dtype, quantization: ChatGLMQuantizationConfig | None = None) -> str:
    name = str(dtype).removeprefix("torch.")
    if quantization is not None:
        name += f" with INT{quantization.bits} weights"
        if quantization.output_bits:
            name += f", INT{quantization.output_bits} output layer"
    return name


def name_precision(model) -> str:
    """Return dtype and quantization of a loaded model."""
    return name_of(model.dtype, get_quantization(model.config))


def describe(name: str, model) -> str:
    """Return a line with the model's name, its device and precision."""
    return f"{name}, {model.device}, {name_precision(model)}"


# Quantization and adapter.


def choose_quantization(
    args: argparse.Namespace, config: ChatGLMConfig
) -> ChatGLMQuantizationConfig | None:
    """Return how the loaded model is to be quantized: as the checkpoint is, else as requested.

    Raises:
        SystemExit: The checkpoint is quantized to other bits than requested, or only the output
            layer is to be quantized.
        ValueError: The checkpoint is quantized by another library.
    """
    chosen = get_quantization(config)
    if chosen is None and args.quantize:
        chosen = ChatGLMQuantizationConfig(bits=args.quantize)
    if args.quantize and args.quantize != chosen.bits:
        raise SystemExit(
            f"--quantize {args.quantize}: {args.model} is quantized to {chosen.bits} bits already: "
            "leave it out, or choose a checkpoint that is not quantized (THUDM/chatglm2-6b)."
        )
    if not args.quantize_output:
        return chosen
    if chosen is None:
        raise SystemExit(
            "--quantize-output rounds the output layer of a quantized model: add --quantize 4 or "
            "--quantize 8."
        )
    return replace(chosen, output_bits=8)


def choose_adapter(
    folder: str | None,
    config: ChatGLMConfig,
    quantization: ChatGLMQuantizationConfig | None,
    is_offloaded: bool,
):
    """Read the adapter, or return `None`; before the weights, because they take longer."""
    if folder is None:
        return None
    with exit_on_error("--adapter "):
        adapter = read_adapter(folder, config, quantization is not None, is_offloaded)
    print(f"{folder}: {adapter}", file=sys.stderr)
    return adapter


# Device and dtype.


def choose_device_and_dtype(
    device: str, dtype: str, checkpoint_dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype, str]:
    """Resolve `--device` and `--dtype`; the last item of the result is the reason."""
    chosen, reason = choose_device(device)
    if dtype == "bfloat16" and not has_bfloat16(chosen):
        raise SystemExit(f"--dtype bfloat16: {chosen} does not support it: use --dtype float16.")
    if dtype != "auto":
        reason += f", {dtype} was requested"
        if chosen.type == "cpu" and dtype == "float16":
            reason += " (slow on a CPU: float32 or bfloat16 is faster)"
        return chosen, DTYPES[dtype], reason
    if chosen.type == "cpu":
        return chosen, torch.float32, f"{reason}, float32 is exact"
    own = checkpoint_dtype or torch.float16
    if own == torch.bfloat16 and not has_bfloat16(chosen):
        return chosen, torch.float16, f"{reason}, float16 because the GPU has no bfloat16"
    return chosen, own, f"{reason}, {name_of(own)} is the checkpoint's own"


def has_bfloat16(device: torch.device) -> bool:
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):  # a machine can have GPUs of several kinds
        return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_device(device: str) -> tuple[torch.device, str]:
    """Resolve `--device`; the second item of the result is the reason."""
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
            f"--device {device}: the installed PyTorch {torch.__version__} {cause}: use "
            "--device cpu, or install PyTorch's CUDA build and the GPU's driver."
        )
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise SystemExit(
            f"--device {device}: the last GPU here is cuda:{torch.cuda.device_count() - 1}."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise SystemExit(f"--device {device}: PyTorch finds no Apple GPU here: use --device cpu.")
    return chosen, "the device was requested"


# Memory.


def count_memory(
    config: ChatGLMConfig, dtype: torch.dtype, quantization: ChatGLMQuantizationConfig | None
) -> float:
    """Return the bytes that a loaded model needs."""
    return count_weight_bytes(config, dtype, quantization) * MEMORY_MARGIN


def describe_cost(
    config: ChatGLMConfig,
    device: torch.device,
    quantization: ChatGLMQuantizationConfig | None,
    requested_dtype: str,
) -> str:
    """Return memory and speed of a large model in float32 on a CPU, or "" for all other models.

    A model that is not quantized gets the advice to use --quantize 4, unless the user has
    requested float32.
    """
    is_float32 = requested_dtype == "auto" or (quantization and requested_dtype == "float32")
    size = count_memory(config, torch.float32, quantization)
    if device.type != "cpu" or not is_float32 or size < LARGE:
        return ""
    needed = gigabytes(size)
    speed = TOKENS_PER_S[quantization.bits if quantization else 4]
    if quantization is not None:
        return (
            f"内存 {needed}；ChatGLM2-6B 在两个 CPU 核上每秒生成 {speed} 个 token / "
            f"memory {needed}; ChatGLM2-6B generates {speed} tokens/s on two CPU cores"
        )
    int4 = gigabytes(count_memory(config, torch.float32, ChatGLMQuantizationConfig(bits=4)))
    return (
        f"内存 {needed}，每个 token 都要全部读一遍；建议加上 --quantize 4：{int4}，ChatGLM2-6B "
        f"在两个 CPU 核上每秒生成 {speed} 个 token / memory {needed}, all of which is read for "
        f"each token; better add --quantize 4: {int4}, ChatGLM2-6B generates {speed} tokens/s on "
        "two CPU cores"
    )


def check_memory(
    model: str,
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None,
):
    """Check that the model fits into the free memory, if that can be read.

    Raises:
        SystemExit: It does not fit; the line lists what would.
    """

    free, needed = get_free_memory(device), count_memory(config, dtype, quantization)
    if free is None or needed <= free:
        return
    smaller = {}
    if dtype == torch.float32 and quantization is None:
        smaller["--dtype bfloat16"] = count_memory(config, torch.bfloat16, None)
    if not config.quantization_bit and (quantization is None or quantization.bits != 4):
        int4 = replace(quantization or ChatGLMQuantizationConfig(bits=4), bits=4)
        smaller["--quantize 4"] = count_memory(config, dtype, int4)
    fitting = {option: size for option, size in smaller.items() if size <= free}
    steps = [f"{option} (needs {gigabytes(size)})" for option, size in fitting.items()]
    steps += ["a machine with more memory"]
    if quantization is None or config.quantization_bit:
        steps += ["--offload-folder FOLDER (the disk holds the rest: slow)"]
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        steps += [f"--num-gpus (there are {torch.cuda.device_count()})"]
    steps += ["the bundled checkpoint (--model resources/chatglm2-tiny)"]
    kind = "内存" if device.type == "cpu" else "显存"
    raise SystemExit(
        f"{model}: {kind}不足：需要 {gigabytes(needed)}，可用 {gigabytes(free)}；请使用 "
        f"{' 或 '.join([*fitting, f'{kind}更大的机器'])} / it needs {gigabytes(needed)} for "
        f"{name_of(dtype, quantization)} on {device}, {gigabytes(free)} free: use "
        f"{', or '.join(steps)}."
    )
