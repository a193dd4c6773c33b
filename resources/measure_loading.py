"""Measure what loading the 6B model quantized takes: memory of this process, and time.

    python resources/measure_loading.py FOLDER [--layout safetensors|bin] [--quantize 4|8]

Writes a checkpoint of the official shapes into FOLDER (12.5 GB; random float16 weights, 7 files)
unless one is there, loads it as the scripts do, then calls `.float()`. Linux only.
"""

import argparse
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer  # noqa: E402

CONFIG = {
    "seq_length": 32768,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
}
NUM_FILES = 7  # as the official checkpoint
FILE_NAMES = {
    "safetensors": "model-{:05}-of-{:05}.safetensors",
    "bin": "pytorch_model-{:05}-of-{:05}.bin",
}
INDEX_NAMES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
SAMPLE_INTERVAL_S = 0.005


def write_checkpoint(folder: Path, layout: str, config: dict):
    """Write random weights, a file at a time, and the bundled model's tokenizer."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    total, done, weight_map = sum(p.numel() for p in model.parameters()), 0, {}
    files = [{} for _ in range(NUM_FILES)]
    for name, parameter in model.named_parameters():
        files[NUM_FILES * done // total][name] = parameter.shape
        done += parameter.numel()
    folder.mkdir(parents=True, exist_ok=True)
    for i, shapes in enumerate(files, start=1):
        file = FILE_NAMES[layout].format(i, NUM_FILES)
        state = {
            name: torch.empty(shape, dtype=torch.float16).normal_(0, 0.02)
            for name, shape in shapes.items()
        }
        if layout == "bin":
            torch.save(state, folder / file)
        else:
            save_file(state, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / INDEX_NAMES[layout]).write_text(json.dumps(index))
    ChatGLMTokenizer.from_pretrained(ROOT / "resources/chatglm2-tiny").save_pretrained(folder)
    ChatGLMConfig(**config, dtype="float16").save_pretrained(folder)  # last: now it is complete


def read_memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


class PeakMemory:
    """Samples the anonymous memory of this process, which no file backs, while a block runs."""

    def __enter__(self):
        self.peak, self.is_done = 0, threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self):
        while not self.is_done.wait(SAMPLE_INTERVAL_S):
            self.peak = max(self.peak, read_memory("RssAnon"))

    def __exit__(self, *exception):
        self.is_done.set()
        self.thread.join()
        self.peak = max(self.peak, read_memory("RssAnon"))


def measure(folder: Path, bits: int) -> list[tuple[str, float]]:
    """Load a checkpoint and convert it; return (what, GB or s) rows."""
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    argv = ["--model", str(folder), "--device", "cpu", "--dtype", "float16"]
    before, start = read_memory("RssAnon"), time.monotonic()
    with PeakMemory() as memory:
        _, model = utils.load_model(parser.parse_args([*argv, "--quantize", str(bits)]))
    seconds = time.monotonic() - start
    loaded, peak, resident = read_memory("RssAnon"), memory.peak, read_memory("VmRSS")
    with PeakMemory() as memory:
        model.float()
    return [
        ("anonymous memory before loading, GB", before / 1e9),
        ("its peak while loading, GB", peak / 1e9),
        ("after loading, GB", loaded / 1e9),
        ("after loading, with mapped pages of the files, GB", resident / 1e9),
        ("peak in .float(), GB", memory.peak / 1e9),
        ("after .float(), GB", read_memory("RssAnon") / 1e9),
        ("time to load, s", seconds),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what loading the 6B model takes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=FILE_NAMES, default="safetensors")
    parser.add_argument("--quantize", type=int, choices=[4, 8], default=4)
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").exists():
        # in a process of its own, whose memory is gone when loading is measured
        options = {"args": (args.folder, args.layout, CONFIG)}
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, **options)
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit(writer.exitcode)
    for what, value in measure(args.folder, args.quantize):
        print(f"{what}: {value:.2f}")


if __name__ == "__main__":
    main()
