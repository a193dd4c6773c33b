"""Fixtures that several test files use.

pytest-xdist runs several processes, and each has its own session fixtures: a fixture writes
only into `tmp_path_factory` and lets the system choose ports. The compiled kernels are the only
files that the processes share; build_cpu.py creates them atomically.
"""

import os
import platform
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are small. Threads of several processes on the same cores wait for each other, and
# make a test take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
TINY = ROOT / "resources" / "chatglm2-tiny"
X86_ISAS = ["amx", "avx512", "avxvnni", "avx2", "portable"]
ARM_ISAS = ["i8mm", "neon", "portable"]
ISAS = ARM_ISAS if platform.machine() in ("aarch64", "arm64") else X86_ISAS  # of the C kernels
FOLDERS = [ROOT, ROOT / "resources", TINY / "training", ROOT / "evaluation"]
sys.path[:0] = map(str, FOLDERS)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The folder of the bundled checkpoint."""
    return TINY


def pytest_terminal_summary(terminalreporter):
    """Print one line for each reason to skip tests, with the number of tests."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


def find_file(variable: str, how: str) -> Path:
    """Return the path that an environment variable holds; skip the test if it is not set."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set: {how}, see docs/development.md")
    assert Path(path).exists(), f"{variable}={path}: no such file or folder"
    return Path(path).absolute()


@pytest.fixture(scope="session")
def official_tokenizer():
    from chatglm2 import ChatGLMTokenizer

    how = "download tokenizer.model from https://huggingface.co/THUDM/chatglm2-6b"
    path = find_file("CHATGLM_OFFICIAL_TOKENIZER", how)
    return ChatGLMTokenizer(path / "tokenizer.model" if path.is_dir() else path)


@pytest.fixture(scope="session")
def evaldata() -> Path:
    """A folder with the benchmark data: `ceval`, `mmlu`, `gsm8k` and `bbh`."""
    return find_file("CHATGLM_EVALDATA", "download the data named in evaluation/README.md")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint):
    from chatglm2 import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    """The bundled checkpoint in float32; a test must leave it as it was."""
    import torch

    from chatglm2 import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="session")
def int4_checkpoint(tiny_checkpoint, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with the bundled checkpoint, quantized."""
    from chatglm2 import ChatGLMForConditionalGeneration

    folder = tmp_path_factory.mktemp("int4")
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint).quantize(4)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def require_library() -> str:
    """Return the instructions of the C kernels; a compiler that fails is no reason to skip."""
    from chatglm2.kernels import build_cpu

    library, problem = build_cpu.get_library()
    if problem and ("no C compiler" in problem or "this CPU lacks" in problem):
        pytest.skip(problem)
    assert problem is None
    return library.chatglm_isa().decode()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Compile for and run one of the sets of instructions."""
    from chatglm2.kernels import build_cpu

    monkeypatch.setenv(build_cpu.ISA_VARIABLE, request.param)
    build_cpu.get_library.cache_clear()
    try:
        assert require_library() == request.param
        yield
    finally:
        build_cpu.get_library.cache_clear()


@pytest.fixture(scope="module")
def server(tiny_model, tiny_tokenizer):
    """openai_api.py with the bundled model."""
    from servers import serve

    import openai_api

    with serve(openai_api.create_app, tiny_model, tiny_tokenizer) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client of the server."""
    import openai

    base_url = str(server.base_url).rstrip("/") + "/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


@pytest.fixture
def need_library(request):
    if "isa" not in request.fixturenames:
        require_library()


@pytest.fixture
def four_gpus(monkeypatch):
    """Four pretended GPUs."""
    import torch
    from fake_devices import pretend_gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CHATGLM_BACKEND", "torch")  # the others look at the real GPU
    with pretend_gpus():
        yield


@pytest.fixture(params=["official_tokenizer", "tiny_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by Playwright: one context, so that pages share its cache.

    Not of the whole session: Playwright runs an event loop in this thread, and asyncio only one.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if not (path := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = chromium.new_context()
        context.set_default_timeout(20_000)
        yield context
        chromium.close()
