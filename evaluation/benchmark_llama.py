"""llama.cpp for benchmark.py, with a random GGUF file or with one of a checkpoint's weights.

Needs llama-cpp-python and gguf, and must not import torch.
"""

import ctypes
import time
from importlib.metadata import version
from pathlib import Path

LEVEL_SPREAD = {"Q4_0": 4.6, "Q8_0": 73.9}  # standard deviations of levels that are random bits
MICRO_BATCH = 512  # llama.cpp's defaults
BATCH = 2048


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
    scale = np.float16(spread / LEVEL_SPREAD[kind])
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def describe_file(path: Path, shape: dict) -> dict:
    """Return the arguments of `Worker.load` for a file.

    They are its path, and the bytes that a new token reads: all weights but one row of the
    embedding, and keys and values of each token before it.
    """
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    embedding, vocab_size = sizes["token_embd.weight"], shape["padded_vocab_size"]
    numbers = shape["num_layers"] * shape["num_key_value_heads"] * shape["kv_channels"]
    return {
        "path": str(path),
        "vocab_size": vocab_size,
        "weight_bytes": sum(sizes.values()) - embedding + embedding // vocab_size,
        "cache_bytes": 2 * 2 * numbers,  # keys, values; float16
    }


def write_gguf(path: Path, shape: dict, kind: str, output_kind: str):
    """Write a random model whose layers are equal, so that memory holds one."""
    import gguf
    import numpy as np

    kind, output_kind = kind.upper(), output_kind.upper()
    hidden, inner = shape["hidden_size"], shape["ffn_hidden_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim, vocab_size = shape["kv_channels"], shape["padded_vocab_size"]
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(shape["seq_length"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(shape["num_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_add_bos_token(False)

    def add(name, matrix, kind="F32"):
        writer.add_tensor(name, matrix, raw_dtype=gguf.GGMLQuantizationType[kind])

    qkv_size = (heads + 2 * kv_heads) * head_dim
    sizes = {
        "attn_qkv": (qkv_size, hidden),
        "attn_output": (hidden, heads * head_dim),
        "ffn_up": (2 * inner, hidden),
        "ffn_down": (hidden, inner),
    }
    layer = {name: make_matrix(*rows_columns, kind) for name, rows_columns in sizes.items()}
    ones = np.ones(hidden, np.float32)
    add("token_embd.weight", make_matrix(vocab_size, hidden, kind), kind)
    for i in range(shape["num_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", ones)
        add(f"blk.{i}.attn_qkv.bias", np.zeros(qkv_size, np.float32))
        for name, matrix in layer.items():
            add(f"blk.{i}.{name}.weight", matrix, kind)
    add("output_norm.weight", ones)
    add("output.weight", make_matrix(vocab_size, hidden, output_kind), output_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Worker:
    """Loads and measures a file through the C interface of llama.cpp."""

    def load(self, path: str, threads: int, vocab_size: int, weight_bytes: int, cache_bytes: int):
        import llama_cpp

        self.library, self.threads = llama_cpp, threads
        self.vocab_size, self.cache_bytes = vocab_size, cache_bytes
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
            "weight_bytes": weight_bytes,
            "description": f"llama-cpp-python {version('llama-cpp-python')}, cache float16",
        }

    def make_sampler(self):
        """Return the sampling steps of `chat`, with its defaults."""
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

    def measure(self, prompt_tokens: int, new_tokens: int) -> dict:
        llama = self.library
        settings = llama.llama_context_default_params()
        settings.n_ctx = prompt_tokens + new_tokens
        settings.n_batch, settings.n_ubatch = BATCH, MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = self.threads
        session = llama.llama_init_from_model(self.model, settings)
        if not session:
            raise RuntimeError("llama.cpp cannot make a context")
        sampler = self.make_sampler()
        times, start = [], time.perf_counter()
        ids = [i * 7919 % (self.vocab_size - 5) + 5 for i in range(prompt_tokens)]
        for _ in range(new_tokens):
            self.feed(session, ids)
            ids = [llama.llama_sampler_sample(sampler, session, -1)]
            times.append(time.perf_counter())
        llama.llama_sampler_free(sampler)
        llama.llama_free(session)
        return {
            "first_token_s": times[0] - start,
            "decode_s": times[-1] - times[0],
            "cache_bytes": self.cache_bytes,
        }
