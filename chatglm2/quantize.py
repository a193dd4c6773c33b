"""Save a checkpoint with INT4 or INT8 weights.

    python -m chatglm2.quantize CHECKPOINT DIR --bits 4

CHECKPOINT is the folder of chatglm2-6b or another ChatGLM2 model that is not quantized, DIR a new
folder. The tensors are read from the mapped files and quantized one by one, so only the quantized
ones need memory: 4 GB for ChatGLM2-6B with 4 bits. DIR appears when it is complete; until then its
files are in DIR.unfinished.
"""

import argparse
import shutil
from pathlib import Path

import torch

from .checkpoint import check_new_folder, read_checkpoint
from .configuration_chatglm import ChatGLMConfig
from .errors import exit_on_error, print_result, run_command
from .hardware import get_free_memory, get_free_space, gigabytes
from .json_files import read_generation_config
from .modeling_chatglm import ChatGLMForConditionalGeneration
from .placement import MEMORY_MARGIN, count_weight_bytes
from .quantization import ChatGLMQuantizationConfig, get_quantization
from .tokenization_chatglm import ChatGLMTokenizer


def check_config(config: ChatGLMConfig):
    """Check that a model is not quantized.

    Raises:
        ValueError: It is.
    """
    if present := get_quantization(config):
        raise ValueError(f"it has {present.bits} bits already: use it as it is.")


def check_space(config: ChatGLMConfig, quantization: ChatGLMQuantizationConfig, folder: Path):
    """Check that memory and disk can hold the quantized model.

    Raises:
        ValueError: They cannot.
    """
    size = count_weight_bytes(config, config.dtype or torch.float16, quantization)
    memory = get_free_memory(torch.device("cpu"))
    for needed, free, where in (
        (size * MEMORY_MARGIN, memory, "of memory"),
        (size, get_free_space(folder), f"on the disk of {folder}"),
    ):
        if free is not None and needed > free:
            raise ValueError(
                f"{gigabytes(needed)} {where} are needed, {gigabytes(free)} are free: free some, "
                "or use another machine or disk, or fewer --bits."
            )


def save(checkpoint: Path, folder: Path, config, quantization: ChatGLMQuantizationConfig):
    """Quantize the model and write it with its tokenizer."""
    model = ChatGLMForConditionalGeneration.from_pretrained(
        checkpoint,
        config=config,
        generation_config=read_generation_config(checkpoint),
        dtype=config.dtype or torch.float16,
        quantization_config=quantization,
    )
    model.save_pretrained(folder)
    ChatGLMTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def quantize(checkpoint: Path, folder: Path, bits: int) -> str:
    """Write a checkpoint with quantized weights into a new folder; return one line about it.

    Raises:
        ValueError: It is no ChatGLM2 checkpoint, is damaged or quantized already, or memory or
            disk is too small.
        OSError: A file is missing or damaged.
    """
    check_new_folder(folder)
    config = read_checkpoint(checkpoint, check_config)
    quantization = ChatGLMQuantizationConfig(bits=bits)
    check_space(config, quantization, folder)
    unfinished = folder.absolute().with_name(f"{folder.name}.unfinished")
    if unfinished.exists():
        raise ValueError(f"{unfinished} is there, from an interrupted run: delete it first.")
    unfinished.mkdir(parents=True)
    try:
        save(checkpoint, unfinished, config, quantization)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {checkpoint} with INT{bits} weights, {size / 1e9:.2f} GB; chat with it: "
        f"python cli_demo.py --model {folder}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m chatglm2.quantize",
        description="Save a ChatGLM2 checkpoint with INT4 or INT8 weights.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="its folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the new folder")
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], default=4, help="4 (INT4) or 8 (INT8) (default: 4)"
    )
    args = parser.parse_args(argv)
    with exit_on_error(f"{args.checkpoint} was not quantized: "):
        line = quantize(args.checkpoint, args.folder, args.bits)
    print_result(line)


if __name__ == "__main__":
    run_command(main)
