"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random sizes against torch.

The sanitizers replace the memory functions of a process at its start, so this file runs itself as a
program, which gets the compiled library and a seed:

    LD_PRELOAD="libasan.so libstdc++.so.6" python tests/test_sanitizers.py LIBRARY SEED
"""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ISAS, ROOT
from quantized_layers import create_layer

from chatglm2 import ChatGLMCache
from chatglm2.generation_chatglm import RaggedCache
from chatglm2.kernels import build_cpu, cpu_backend, cpu_layers
from chatglm2.kernels.cpu_backend import CPUBackend
from chatglm2.quantization import ModelBackend, torch_matmul

NUM_PRODUCTS, NUM_MODELS = 60, 15
SEED = 0
FLAGS = ["-Og", "-g1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover"]
WAYS = {  # with vectors of 16 lanes in plain C for every CPU
    **{isa: build_cpu.ISA_FLAGS[isa] for isa in ISAS},
    "portable with 16 lanes": ["-DPORTABLE", "-DLANES=16"],
}
OPTIONS = "detect_leaks=0"  # Python frees little at its end
CACHE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def find_gcc() -> list[str]:
    """Return the first compiler with gcc's sanitizers, or skip the test."""
    try:
        compilers = build_cpu.find_compilers()
    except RuntimeError as error:
        pytest.skip(str(error))
    for compiler in compilers:
        if find_library(compiler, "libasan.so").is_absolute():
            return compiler
    pytest.skip("needs gcc with libasan: on Debian, apt-get install gcc libc6-dev")


def find_library(compiler: list[str], name: str) -> Path:
    """Return the path of a compiler's library; it is not absolute if there is none."""
    return Path(build_cpu.run([*compiler, f"-print-file-name={name}"]).strip())


@pytest.mark.slow  # compiles
@pytest.mark.skipif(sys.platform != "linux", reason="preloads libraries as Linux does")
@pytest.mark.parametrize("way", WAYS)
def test_kernels_under_sanitizers(way, tmp_path):
    compiler = find_gcc()
    command = [*compiler, *build_cpu.FLAGS, *FLAGS, *WAYS[way]]
    library = build_cpu.compile_into(tmp_path, "cpu.so", command)
    preloaded = [find_library(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"LD_PRELOAD": " ".join(map(str, preloaded)), "ASAN_OPTIONS": OPTIONS}
    variables |= {build_cpu.ISA_VARIABLE: way if way in ISAS else ""}
    variables |= {"UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, __file__, str(library), str(SEED)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if run.returncode and "this CPU lacks" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stderr[-8000:]


# The program


def choose_threads():
    count = random.randint(1, 3)
    return patch.object(torch, "get_num_threads", lambda: count)


def draw_x(*shape: int) -> torch.Tensor:
    """Return activations of all magnitudes, with zeros, or with NaN and infinity."""
    x = torch.randn(shape) * 10.0 ** random.choice([0, 0, 0, 30, -30, -44])
    for value in random.choice([(), (), (0, 0, 0), (float("nan"),), (float("inf"), -float("inf"))]):
        if x.numel():
            x.view(-1)[random.randrange(x.numel())] = value
    return x


def check_product(y: torch.Tensor, x: torch.Tensor, expected: torch.Tensor, tolerance: float):
    """Rows with NaN or infinity give NaN; others are as near as a part of their largest output."""
    assert y.shape == expected.shape
    y, x, expected = (t.reshape(-1, t.shape[-1]).double() for t in (y, x, expected))
    is_finite = x.isfinite().all(-1)
    assert not y[~is_finite].isfinite().any()
    size = x[is_finite].norm(dim=-1, keepdim=True)
    assert ((y - expected)[is_finite].abs() <= tolerance * size + 1e-28).all()


def check_quantized_product():
    bits, group_size = random.choice([(8, None), (4, None), (4, 128)])
    sizes = random.randint(1, 40), random.randint(100, 2500), 64 * random.randint(1, 30)  # for AMX
    in_features = random.choice(sizes)
    in_features += -in_features % (group_size or 8 // bits)
    layer = create_layer(bits, group_size, in_features, random.randint(1, 150))
    official = layer.weight.clone()
    x = draw_x(*random.choices(range(7), k=random.randint(0, 2)), in_features)
    with choose_threads():
        y = CPUBackend().matmul(x, layer)
        assert torch.equal(layer.weight, official)
    largest = layer.weight_scale.abs().max().item() * 2 ** (bits - 1)
    expected = torch_matmul(x.double(), layer)
    check_product(y, x, expected, largest * in_features**0.5 * 1e-4)


def check_stored_product():
    weight = torch.randn(random.randint(1, 100), random.randint(1, 1500))
    weight = weight.to(random.choice(CACHE_DTYPES[1:]))
    x = draw_x(random.randint(0, 20), weight.shape[1])
    with choose_threads():
        y = CPUBackend().stored_matmul(x, weight)
    check_product(y, x, F.linear(x.double(), weight.double()), 1e-5 * weight.shape[1] ** 0.5)


def create_model():
    from test_cpu_layers import create

    bits, group_size = random.choice([(8, None), (4, None), (4, 128)])
    multiple = group_size or 2
    num_kv_heads, head_dim = random.randint(1, 3), 4 * random.randint(1, 10)
    if group_size:
        head_dim = 128 * random.randint(1, 2)
    num_heads = num_kv_heads * random.choice([1, 2, 3, 16, 17])
    if num_heads * head_dim > 2200:  # the attention of a long prompt would take many seconds
        num_heads, num_kv_heads = num_heads // num_kv_heads, 1
    if num_heads * head_dim % multiple:
        num_heads *= multiple
    return create(
        bits,
        group_size,
        num_layers=random.randint(1, 2),
        hidden_size=multiple * random.randint(1, 1000 // multiple),
        ffn_hidden_size=multiple * random.randint(1, 1300 // multiple),
        kv_channels=head_dim,
        num_attention_heads=num_heads,
        multi_query_group_num=num_kv_heads,
        add_bias_linear=random.random() < 0.5,
        apply_residual_connection_post_layernorm=random.random() < 0.2,
    )


def create_cache(model, batch: int, dtype: torch.dtype, is_ragged: bool):
    from test_cpu_layers import fill

    lengths = random.choices([0, 1, random.randint(2, 70), random.randint(500, 1100)], k=batch)
    if is_ragged:
        rows = (fill(model, max(n, 1), seed=i, dtype=dtype) for i, n in enumerate(lengths))
        return RaggedCache(list(rows))
    return fill(model, lengths[0], batch, dtype=dtype) if batch and lengths[0] else ChatGLMCache()


def draw_inputs(model, dtype: torch.dtype) -> dict:
    """Return the arguments of a forward: ids, a cache, and sometimes a mask or positions."""
    is_ragged, batch = random.random() < 0.3, random.choice([0, 1, 1, 2, 3, 5])
    if is_ragged and batch:
        cache = create_cache(model, batch, dtype, is_ragged)
        positions = torch.tensor([[row.get_seq_length()] for row in cache.rows])
        return {"input_ids": positions % 96, "position_ids": positions, "past_key_values": cache}
    num_new = random.choice([0, 1, 2, random.randint(3, 40), 300])
    cache = create_cache(model, batch, dtype, is_ragged=False)
    inputs = {"input_ids": torch.randint(96, (batch, num_new)), "past_key_values": cache}
    if batch and num_new and random.random() < 0.2:
        mask = torch.ones(batch, cache.get_seq_length() + num_new, dtype=torch.long)
        mask[0, : mask.shape[1] // 2] = 0
        inputs["attention_mask"] = mask
    return inputs


@torch.no_grad()
def check_model():
    """One forward with a cache: C computes the layers, or products where a batch is padded."""
    model, dtype = create_model(), random.choice(CACHE_DTYPES)
    model.transformer.cache_dtype = dtype
    inputs = draw_inputs(model, dtype)
    expected_inputs = copy.deepcopy(inputs)
    with choose_threads():
        logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 96)
    if logits.numel():  # plain torch does not compute empty batches
        with patch.object(ModelBackend, "get", lambda *args: None):
            expected = model(**expected_inputs).logits
        # Products round activations to 16 bits. The largest error of 350 models was 1.5e-4.
        tolerance = 5e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def main(library: str, seed: str):
    random.seed(int(seed))
    torch.manual_seed(int(seed))
    loaded = build_cpu.load(Path(library))
    for module in (cpu_backend, cpu_layers):
        module.get_library = lambda: (loaded, None)
    for check, count in (
        (check_quantized_product, NUM_PRODUCTS),
        (check_stored_product, NUM_PRODUCTS),
        (check_model, NUM_MODELS),
    ):
        for _ in range(count):
            check()


if __name__ == "__main__":
    main(*sys.argv[1:])
