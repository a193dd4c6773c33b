"""This project's model for benchmark.py, with random weights or a checkpoint's; read bandwidth."""

import argparse
import math
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import utils
from chatglm2 import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    generation_chatglm,
    gguf,
    loading,
)
from chatglm2.checkpoint import download_weights, locate_descriptions
from chatglm2.errors import exit_on_error
from chatglm2.hardware import choose_threads
from chatglm2.json_files import read_config
from chatglm2.kernels.cpu_backend import allocate
from chatglm2.placement import create_empty_model
from chatglm2.quantization import ChatGLMQuantizationConfig, QuantizedLinear, get_quantization

SHAPE_6B = {  # where the checkpoint's config.json differs from the class's defaults
    "seq_length": 32768,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
}
SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "kv_channels",
    "padded_vocab_size",
    "seq_length",
)
# Standard deviations of levels that are random bytes, or random halves of them.
LEVEL_SPREAD = {8: math.sqrt((2**16 - 1) / 12), 4: math.sqrt((2**8 - 1) / 12)}
FIRST_ID = 100  # random prompts have no special tokens
QUESTION = "请介绍一下北京的历史、文化和美食。What is worth seeing there in three days? "
TAIL = 8  # last ids of a prompt, which are kept when it is cut
READ_BYTES = 1 << 30
READ_ROWS = 256  # divided among the threads
READ_S = 1.0


def read_shape(args: argparse.Namespace) -> ChatGLMConfig:
    """Return the configuration of the model to be measured."""
    with exit_on_error(f"--model {args.model}: "):
        if not args.random_weights:
            folder, _ = locate_descriptions(args.model, args.revision)
            return read_config(folder)
        return read_config(Path(args.model)) if args.model else ChatGLMConfig(**SHAPE_6B)


def write_gguf(args: argparse.Namespace, file: Path, kind: str):
    """Write the checkpoint for llama.cpp.

    Raises:
        ValueError, OSError: It cannot be written as `kind`.
    """
    folder, hub_info = locate_descriptions(args.model, args.revision)
    if hub_info is not None:
        folder = download_weights(args.model, args.revision, hub_info)
    gguf.convert(folder, file, kind, may_round=True)


def describe_setting(args: argparse.Namespace) -> dict:
    """Return what is measured, and where; set the number of threads for all engines."""
    args.threads = args.threads or choose_threads() or torch.get_num_threads()
    config, (device, _) = read_shape(args), loading.choose_device(args.device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return {
        "model": "random weights" if args.random_weights else args.model,
        "shape": {name: getattr(config, name) for name in SHAPE_FIELDS},
        "machine": machine,
    }


@torch.no_grad()
def create_random_model(
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None = None,
) -> ChatGLMForConditionalGeneration:
    """Return a model of random weights, which are made in the form in which they are stored.

    The outputs of each matrix have the variance of its inputs, so that nothing overflows.
    """
    model = create_empty_model(config, quantization).to(dtype).eval()
    for module in model.modules():
        module.to_empty(device=device, recurse=False)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, QuantizedLinear) and name == "weight_scale":
                parameter.fill_(1 / (LEVEL_SPREAD[module.bits] * math.sqrt(module.in_features)))
            elif parameter.dtype == torch.int8:
                parameter.random_(-128, 128)
            elif parameter.dim() == 1:
                parameter.fill_(name == "weight")  # of a norm; else a bias
            else:
                bound = math.sqrt(3 / parameter.shape[1])
                parameter.uniform_(-bound, bound)
        if isinstance(module, QuantizedLinear):  # now, because it may copy the weights
            backend = module.backend.get(device, dtype)
            if backend is not None:
                backend.prepare(module)
    model.tie_weights()
    return model


def count_read_bytes(model: ChatGLMForConditionalGeneration) -> int:
    """Return the bytes of weights that a new token reads: all, but one row of the embedding."""
    embedding = model.get_input_embeddings().weight
    size = sum(parameter.nbytes for parameter in model.parameters())
    if embedding is model.get_output_embeddings().weight:
        return size
    return size - embedding.nbytes + embedding[0].nbytes


class Stamps(BaseStreamer):
    """Notes the time of each token that `generate` produces."""

    def __init__(self):
        self.times = []
        self.has_prompt = False

    def put(self, value):
        if self.has_prompt:
            self.times.append(time.perf_counter())
        self.has_prompt = True

    def end(self):
        pass


class Worker:
    """Loads and measures a model."""

    model = tokenizer = None

    def load(self, **settings) -> dict:
        """Load the model that the arguments of benchmark.py describe."""
        logging.disable_progress_bar()
        args, start = argparse.Namespace(**settings), time.perf_counter()
        if args.random_weights:
            self.model = self.load_random(args)
        else:
            self.tokenizer, self.model = utils.load_model(args)
        description = f"{self.model.device}, {loading.name_precision(self.model)}"
        if args.kv_cache_dtype != "auto":
            description += f", cache {args.kv_cache_dtype}"
        quantization = get_quantization(self.model.config)
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {
            "name": f"int{quantization.bits}" if quantization else dtype,
            "load_s": time.perf_counter() - start,
            "weight_bytes": count_read_bytes(self.model),
            "description": description,
        }

    def load_random(self, args: argparse.Namespace) -> ChatGLMForConditionalGeneration:
        torch.set_num_threads(args.threads)
        config = read_shape(args)
        quantization = loading.choose_quantization(args, config)
        own = config.dtype or torch.float16
        device, dtype, _ = loading.choose_device_and_dtype(args.device, args.dtype, own)
        loading.check_memory("this shape", config, device, dtype, quantization)
        model = create_random_model(config, device, dtype, quantization)
        model.base_model.cache_dtype = loading.DTYPES.get(args.kv_cache_dtype)
        return model

    def draw_prompt(self, length: int) -> torch.Tensor:
        """Return ids [1, length] of a question, or random ids if there is no tokenizer."""
        if self.tokenizer is None:
            size = self.model.config.padded_vocab_size
            ids = torch.randint(min(FIRST_ID, size - 1), size, (length,)).tolist()
        else:
            ids = self.tokenizer.encode(self.tokenizer.build_prompt(QUESTION * length))
            ids = ids[: length - TAIL] + ids[-TAIL:] if length > TAIL else ids[:length]
        return torch.tensor([ids], device=self.model.device)

    def measure(self, prompt_tokens: int, new_tokens: int) -> dict:
        """Generate as `chat` does."""
        ids, stamps = self.draw_prompt(prompt_tokens), Stamps()
        cache = generation_chatglm.ChatGLMCache()
        sampling = {k: v for k, v in generation_chatglm.CHAT_DEFAULTS.items() if k != "max_length"}
        start = time.perf_counter()
        sequences = self.model.generate(
            ids,
            past_key_values=cache,
            streamer=stamps,
            max_new_tokens=new_tokens,
            eos_token_id=None,  # all answers have the same length
            logits_processor=LogitsProcessorList(
                [generation_chatglm.InvalidScoreLogitsProcessor()]
            ),
            **sampling,
        )
        result = {
            "first_token_s": stamps.times[0] - start,
            "decode_s": stamps.times[-1] - stamps.times[0],
            "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            / cache.get_seq_length(),
        }
        if self.model.device.type == "cuda":
            result["memory_bytes"] = torch.cuda.max_memory_allocated(self.model.device)
        if self.tokenizer is not None:
            result["characters"] = len(self.tokenizer.decode(sequences[0, ids.shape[1] :].tolist()))
        return result


class BandwidthReader:
    """Measures how fast all threads together read a buffer that is larger than any cache."""

    def __init__(self, args: argparse.Namespace):
        torch.set_num_threads(args.threads)
        device, _ = loading.choose_device(args.device)
        if device.type == "cpu":
            buffer = allocate(READ_BYTES).zero_()
        else:
            buffer = torch.zeros(READ_BYTES, dtype=torch.uint8, device=device)
        self.rows = buffer.view(torch.int64).view(READ_ROWS, -1)

    def read(self) -> float:
        """Return bytes/s, the median of the passes within about a second."""
        end, rates = time.perf_counter() + READ_S, []
        while not rates or time.perf_counter() < end:
            start = time.perf_counter()
            self.rows.sum(1).tolist()
            rates.append(READ_BYTES / (time.perf_counter() - start))
        return statistics.median(rates)
