"""For tests of the pages and the terminal: the bundled model, slow or echoing if asked to.

As a program it runs a script or a module with this model and notes the addresses that it uses.

    python tests/page_models.py NOTES web_demo.py [argument ...]
    python tests/page_models.py NOTES streamlit run web_demo2.py [argument ...]
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch

sys.path.append(str(Path(__file__).parent.parent))

import utils
from chatglm2 import ChatGLMCache
from chatglm2.chat import shared_model
from chatglm2.serving.batching import Batcher

load_model = utils.load_model  # before it is replaced

PAUSE_S = 0.1


class Script:
    """A logits processor that makes the answers of `ScriptedBatcher`."""

    def __init__(self, tokenizer, prompt: list[int], query: str):
        self.ids, self.length, self.query = [], len(prompt), query
        if query.startswith("echo "):  # as after a prompt, where a first space counts
            self.ids = tokenizer.encode(
                "：" + query.removeprefix("echo "), add_special_tokens=False
            )
            first = tokenizer.encode("：", add_special_tokens=False)
            assert self.ids[: len(first)] == first
            self.ids = self.ids[len(first) :]
        self.is_scripted = bool(self.ids) or query == "silent"
        self.end = tokenizer.eos_token_id

    def __call__(self, input_ids, scores):
        if self.query == "fail":
            raise RuntimeError("no memory <b>left</b>")
        if "故事" in self.query:
            time.sleep(PAUSE_S)
        if not self.is_scripted:
            return scores
        position = input_ids.shape[1] - self.length
        chosen = self.ids[position] if position < len(self.ids) else self.end
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([chosen]), 0.0)


class ScriptedBatcher(Batcher):
    """Answers greedily, and slowly if asked for a story.

    It answers "echo X" with X, "running" with the number of the other running answers and "silent"
    with nothing, and fails at "fail". `requests` has the settings and the prompt of all requests.
    """

    requests: ClassVar[list[dict]] = []

    def submit(self, request, queue, index=0):
        prompt = self.tokenizer.decode(request.input_ids)
        query = prompt.rpartition("问：")[2].rpartition("\n\n答：")[0]
        self.requests.append({**vars(request), "prompt": prompt, "query": query})
        query = f"echo {len(self.running)}" if query == "running" else query
        request.temperature = 0
        request.processors.append(Script(self.tokenizer, request.input_ids, query))
        return super().submit(request, queue, index)


class SlowModel:
    """A model for the terminal, which answers "echo X" with X, and slowly if asked for a story."""

    def __init__(self, model):
        self.model = model
        self.config, self.generation_config = model.config, model.generation_config
        self.device, self.dtype = model.device, model.dtype

    def stream_chat(self, tokenizer, query, history, past_key_values, **settings):
        if query.startswith("echo "):
            answer = query.removeprefix("echo ")
            yield answer, [*history, (query, answer)], ChatGLMCache()
            return
        pauses = [Script(tokenizer, [], query)] if "故事" in query else []
        settings |= {"do_sample": False, "logits_processor": pauses}
        yield from self.model.stream_chat(tokenizer, query, history, past_key_values, **settings)


def load_slow_model(args):
    tokenizer, model = load_model(args)
    return tokenizer, SlowModel(model)


def note_address(event: str, args: tuple, notes: Path):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo"):
        address = args[1] if event != "socket.getaddrinfo" else args[0]
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps([event, str(address)]) + "\n")


if __name__ == "__main__":
    notes, program = Path(sys.argv[1]), sys.argv[2]
    notes.touch()
    sys.addaudithook(lambda event, args: note_address(event, args, notes))
    shared_model.Batcher = ScriptedBatcher
    if Path(program).name == "cli_demo.py":
        utils.load_model = load_slow_model
    sys.argv = sys.argv[2:]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
