"""Worker of benchmark.py: this project's model, with random weights or a checkpoint's.

Also measures how fast memory can be read.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark_worker import read_peak_memory, serve  # noqa: E402

import utils  # noqa: E402
from chatglm2 import (  # noqa: E402
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMTokenizer,
    generation_chatglm,
    loading,
)
from chatglm2.checkpoint import locate_checkpoint, read_config  # noqa: E402
from chatglm2.errors import one_line  # noqa: E402
from chatglm2.kernels.cpu_backend import allocate  # noqa: E402
from chatglm2.quantization import ChatGLMQuantizationConfig, QuantizedLinear  # noqa: E402

SHAPE_6B = {  # where the checkpoint's config.json differs from the class's defaults
    "seq_length": 32768,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
}
# Standard deviations of levels that are random bytes, or random halves of them.
LEVEL_SPREAD = {8: math.sqrt((2**16 - 1) / 12), 4: math.sqrt((2**8 - 1) / 12)}
FIRST_ID = 100  # prompts have no special tokens
QUESTION = "请介绍一下北京的历史、文化和美食。What is worth seeing there in three days? "
TAIL = 8  # ids of a prompt's end that are kept when it is cut
READ_BYTES = 1 << 30
READ_ROWS = 256  # each thread sums some of them
READ_S = 1.0


def read_shape(args: argparse.Namespace) -> ChatGLMConfig:
    """Return the configuration of the model to be measured."""
    if not args.random_weights:
        folder, _ = locate_checkpoint(args.model, args.revision)
        revision = {} if folder else {"revision": args.revision or "main"}
        return read_config(folder or args.model, **revision)
    config = ChatGLMConfig(**SHAPE_6B)
    if args.config is not None:
        file = Path(args.config)
        file = file / "config.json" if file.is_dir() else file
        try:
            fields = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"--config {args.config}: {one_line(error)}: give a config.json or its folder."
            ) from error
        if not isinstance(fields, dict) or fields.get("model_type") != "chatglm":
            raise SystemExit(f"--config {args.config} does not say model_type 'chatglm'.")
        config = ChatGLMConfig.from_dict(fields)
    if args.layers is not None:
        config.num_layers = args.layers
    return config


@torch.no_grad()
def create_random_model(
    config: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: ChatGLMQuantizationConfig | None = None,
) -> ChatGLMForConditionalGeneration:
    """Return a model of random weights, made in the form in which they are stored.

    Each output of a layer has the variance of its inputs, so that nothing overflows.
    """
    if quantization is not None:
        fields = {"quantization_config": quantization.to_dict()}
        config = ChatGLMConfig.from_dict(config.to_dict() | fields)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    model = model.to(dtype).eval()
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
        if isinstance(module, QuantizedLinear):  # now: its own copy is not to stay until the end
            backend = module.backend.get(device, dtype)
            if backend is not None:
                backend.prepare(module)
    model.tie_weights()
    return model


def count_read_bytes(model: ChatGLMForConditionalGeneration) -> int:
    """Return how many bytes of weights a new token needs: all, but one row of the embedding."""
    embedding = model.get_input_embeddings().weight
    size = sum(parameter.nbytes for parameter in model.parameters())
    if embedding is model.get_output_embeddings().weight:
        return size
    return size - embedding.nbytes + embedding[0].nbytes


class Stamps(BaseStreamer):
    """The time of each token that `generate` hands over."""

    def __init__(self):
        self.times = []
        self.has_prompt = False

    def put(self, value):
        if self.has_prompt:
            self.times.append(time.perf_counter())
        self.has_prompt = True

    def end(self):
        pass


class ModelWorker:
    """What the worker's commands do."""

    model = tokenizer = None

    def load(self, **settings) -> dict:
        """Load what the settings, those of `parse_args` in benchmark.py, describe."""
        args, start = argparse.Namespace(**settings), time.perf_counter()
        if not args.random_weights:
            self.tokenizer, self.model = utils.load_model(args)
        else:
            self.model = self.load_random(args)
        description = f"{self.model.device}, {loading.name_precision(self.model)}"
        if args.exact_prefill:
            description += ", exact prefill"
        if args.kv_cache_dtype != "auto":
            description += f", cache {args.kv_cache_dtype}"
        return {
            "load_s": time.perf_counter() - start,
            "weight_bytes": count_read_bytes(self.model),
            "description": description,
        }

    def load_random(self, args: argparse.Namespace):
        if args.threads:
            torch.set_num_threads(args.threads)
        config = read_shape(args)
        quantization = loading.choose_quantization(args, config)
        own = config.dtype or torch.float16
        device, dtype, _ = loading.choose_device_and_dtype(args.device, args.dtype, own)
        loading.check_memory("this shape", config, device, dtype, quantization)
        model = create_random_model(config, device, dtype, quantization)
        model.base_model.exact_prefill = args.exact_prefill
        model.base_model.cache_dtype = loading.DTYPES.get(args.kv_cache_dtype)
        return model

    def draw_prompt(self, length: int) -> torch.Tensor:
        """Return ids [1, length]: of a question, or random ones if there is no tokenizer."""
        if self.tokenizer is None:
            size = self.model.config.padded_vocab_size
            ids = torch.randint(min(FIRST_ID, size - 1), size, (length,)).tolist()
        else:
            ids = self.tokenizer.encode(self.tokenizer.build_prompt(QUESTION * length))
            ids = ids[: length - TAIL] + ids[-TAIL:] if length > TAIL else ids[:length]
        return torch.tensor([ids], device=self.model.device)

    @torch.no_grad()
    def fill_cache(self, length: int) -> generation_chatglm.ChatGLMCache:
        """Return a cache that holds random keys and values of so many tokens."""
        cache, model, config = generation_chatglm.ChatGLMCache(), self.model, self.model.config
        shape = 1, config.num_key_value_heads, length, config.kv_channels
        dtype = model.base_model.cache_dtype or model.dtype
        for i in range(config.num_layers if length else 0):
            keys, values = torch.randn(2, *shape, device=model.device, dtype=dtype)
            cache.update(keys, values, i)
        return cache

    def measure(self, context: int, prompt_tokens: int, new_tokens: int) -> dict:
        """Generate as `chat` does, behind `context` tokens of random keys and values."""
        self.model.generation_config.eos_token_id = None  # an answer ends by its length
        ids, stamps = self.draw_prompt(context + prompt_tokens), Stamps()
        cache = self.fill_cache(context)
        sampling = {k: v for k, v in generation_chatglm.CHAT_DEFAULTS.items() if k != "max_length"}
        start = time.perf_counter()
        sequences = self.model.generate(
            ids,
            past_key_values=cache,
            streamer=stamps,
            max_new_tokens=new_tokens,
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
            "memory_bytes": self.read_peak_memory(),
        }
        if self.tokenizer is not None:
            result["characters"] = len(self.tokenizer.decode(sequences[0, ids.shape[1] :].tolist()))
        return result

    def read_peak_memory(self) -> int | None:
        """Return the peak of the GPU's memory, or of this process."""
        device = self.model.device
        return (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else read_peak_memory()
        )

    def save(self, folder: str):
        """Write a checkpoint with the bundled tokenizer; config.json is its last file."""
        self.model.save_pretrained(folder)
        tokenizer = ChatGLMTokenizer.from_pretrained(ROOT / "resources" / "chatglm2-tiny")
        tokenizer.save_pretrained(folder)


class BandwidthWorker:
    """Reads a buffer that no cache can hold, again and again, with all threads."""

    def load(self, **settings):
        args = argparse.Namespace(**settings)
        if args.threads:
            torch.set_num_threads(args.threads)
        device, _ = loading.choose_device(args.device)
        if device.type == "cpu":
            self.buffer = allocate(READ_BYTES).zero_()
        else:
            self.buffer = torch.zeros(READ_BYTES, dtype=torch.uint8, device=device)
        self.rows = self.buffer.view(torch.int64).view(READ_ROWS, -1)

    def measure(self) -> float:
        """Return bytes a second, the median of the passes within about a second."""
        end, rates = time.perf_counter() + READ_S, []
        while not rates or time.perf_counter() < end:
            start = time.perf_counter()
            self.rows.sum(1).tolist()
            rates.append(READ_BYTES / (time.perf_counter() - start))
        return statistics.median(rates)


if __name__ == "__main__":
    logging.disable_progress_bar()
    worker, reader = ModelWorker(), BandwidthWorker()
    serve(
        {"load": worker.load, "measure": worker.measure, "save": worker.save}
        | {"load_reader": reader.load, "read": reader.measure}
    )
