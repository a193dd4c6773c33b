"""Worker of benchmark.py: llama.cpp with a random GGUF file of the same shape.

Runs in any Python that has llama-cpp-python and gguf; imports nothing of this project but
benchmark_worker.py.
"""

import ctypes
import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmark_worker import read_peak_memory, serve

PACKAGES = ("llama-cpp-python", "gguf")
# Standard deviations of levels that are random bits.
LEVEL_SPREAD = {"Q4_0": 4.6, "Q8_0": 73.9, "Q6_K": 18.5}
K_SCALE = 16  # of all parts of a Q6_K block
MICRO_BATCH = 512  # llama.cpp's defaults
BATCH = 2048


def check() -> str:
    """Return the version.

    Raises:
        ImportError: A package is missing.
    """
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError as error:
            raise ImportError(f"there is no {package}") from error
    return f"llama-cpp-python {version(PACKAGES[0])}"


def make_matrix(rows: int, columns: int, kind: str):
    """Return a random matrix in a format of GGUF: the bytes of its rows, or float16."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    spread = columns**-0.5  # outputs have the variance of inputs
    if kind == "F16":
        bound = np.float32(3**0.5 * spread)
        values = random.random((rows, columns), dtype=np.float32)
        return ((2 * values - 1) * bound).astype(np.float16)
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % size:
        raise ValueError(f"{kind} needs a multiple of {size} columns, not {columns}")
    blocks = random.integers(0, 256, (rows * columns // size, num_bytes), dtype=np.uint8)
    scale = np.float16(spread / LEVEL_SPREAD[kind] / (K_SCALE if kind == "Q6_K" else 1))
    place = slice(-2, None) if kind == "Q6_K" else slice(0, 2)
    blocks[:, place] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind == "Q6_K":
        blocks[:, -18:-2] = K_SCALE
    return blocks.reshape(rows, -1)


def write_gguf(path: Path, shape: dict, kind: str, output_kind: str):
    """Write a model; its layers are alike, so that one is in memory."""
    import gguf
    import numpy as np

    hidden, inner, heads = shape["hidden_size"], shape["ffn_hidden_size"], shape["num_heads"]
    kv_heads, size = shape["num_kv_heads"], shape["head_dim"]
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(shape["seq_length"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(shape["num_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_add_bos_token(False)

    def add(name, matrix, kind):
        writer.add_tensor(name, matrix, raw_dtype=gguf.GGMLQuantizationType[kind])

    qkv_size = (heads + 2 * kv_heads) * size
    sizes = {
        "attn_qkv": (qkv_size, hidden),
        "attn_output": (hidden, heads * size),
        "ffn_up": (2 * inner, hidden),
        "ffn_down": (hidden, inner),
    }
    block = {name: make_matrix(*rows_columns, kind) for name, rows_columns in sizes.items()}
    ones = np.ones(hidden, np.float32)
    vocab_size = shape["vocab_size"]
    add("token_embd.weight", make_matrix(vocab_size, hidden, kind), kind)
    for i in range(shape["num_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        writer.add_tensor(f"blk.{i}.attn_qkv.bias", np.zeros(qkv_size, np.float32))
        for name, matrix in block.items():
            add(f"blk.{i}.{name}.weight", matrix, kind)
    writer.add_tensor("output_norm.weight", ones)
    add("output.weight", make_matrix(vocab_size, hidden, output_kind), output_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def count_read_bytes(path: str) -> int:
    """Return how many bytes of weights a new token needs: all, but one row of the embedding."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding = tensors["token_embd.weight"]
    size = sum(int(tensor.n_bytes) for tensor in tensors.values())
    return size - int(embedding.n_bytes) * (int(embedding.shape[1]) - 1) // int(embedding.shape[1])


def make(folder: str, shape: dict, kind: str, output_kind: str) -> str:
    """Return the path of a GGUF file of that shape, written unless the folder has it."""
    names = "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "num_heads"
    numbers = "x".join(str(shape[name]) for name in (*names, "num_kv_heads"))
    path = Path(folder, f"chatglm-{numbers}-{kind}-output-{output_kind}.gguf".lower())
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        write_gguf(unfinished, shape, kind, output_kind)
        os.replace(unfinished, path)
    return str(path)


class LlamaWorker:
    """What the worker's commands do, by llama.cpp's own C interface."""

    def load(self, path: str, shape: dict, threads: int) -> dict:
        import llama_cpp

        self.library, self.threads, self.shape = llama_cpp, threads, shape
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        start = time.perf_counter()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        return {
            "load_s": time.perf_counter() - start,
            "weight_bytes": count_read_bytes(path),
            "description": f"{check()}, {Path(path).name}, cache float16",
        }

    def make_sampler(self):
        """Return the steps of sampling that `chat` has, with its defaults."""
        llama = self.library
        sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for step in (
            llama.llama_sampler_init_top_k(50),  # first: the same choice, in less time
            llama.llama_sampler_init_temp(0.8),
            llama.llama_sampler_init_top_p(0.8, 1),
            llama.llama_sampler_init_dist(0),
        ):
            llama.llama_sampler_chain_add(sampler, step)
        return sampler

    def feed(self, context, ids: list[int]):
        llama = self.library
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            tokens = (llama.llama_token * len(part))(*part)
            if code := llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError(f"llama_decode failed with code {code}")

    def measure(self, context: int, prompt_tokens: int, new_tokens: int) -> dict:
        if context:
            raise ValueError("llama.cpp's cache cannot be filled with random numbers")
        llama = self.library
        settings = llama.llama_context_default_params()
        settings.n_ctx = prompt_tokens + new_tokens
        settings.n_batch, settings.n_ubatch = BATCH, MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = self.threads
        session = llama.llama_init_from_model(self.model, settings)
        if not session:
            raise RuntimeError("llama.cpp cannot make a context")
        sampler = self.make_sampler()
        vocab_size = self.shape["vocab_size"]
        times, start = [], time.perf_counter()
        ids = [i * 7919 % (vocab_size - 5) + 5 for i in range(prompt_tokens)]
        for _ in range(new_tokens):
            self.feed(session, ids)
            ids = [llama.llama_sampler_sample(sampler, session, -1)]
            times.append(time.perf_counter())
        llama.llama_sampler_free(sampler)
        llama.llama_free(session)
        heads, size = self.shape["num_kv_heads"], self.shape["head_dim"]
        return {
            "first_token_s": times[0] - start,
            "decode_s": times[-1] - times[0],
            "cache_bytes": 2 * 2 * self.shape["num_layers"] * heads * size,
            "memory_bytes": read_peak_memory(),
        }


if __name__ == "__main__":
    worker = LlamaWorker()
    serve({"check": check, "make": make, "load": worker.load, "measure": worker.measure})
