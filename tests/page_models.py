"""A model for the tests of the pages: the bundled one, slow, failing or echoing if asked to.

As a program it runs a script or a module with this model and notes the addresses that it uses.

    python tests/page_models.py NOTES web_demo.py [argument ...]
    python tests/page_models.py NOTES streamlit run web_demo2.py [argument ...]
"""

import gc
import json
import runpy
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import utils
from chatglm2 import ChatGLMCache

load_model = utils.load_model  # before it is replaced

PAUSE_S = 0.1


def pause(input_ids, scores):
    time.sleep(PAUSE_S)
    return scores


def count_caches() -> int:
    caches = [item for item in gc.get_objects() if isinstance(item, ChatGLMCache)]
    return sum(cache.get_seq_length() > 0 for cache in caches)


class SlowModel:
    """Answers greedily, and slowly if asked for a story.

    It answers "echo X" with X, "caches" with the number of caches that hold something, and "silent"
    with nothing, and fails at "fail".
    """

    def __init__(self, model):
        self.model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.generation_config, self.calls = model.generation_config, []

    def stream_chat(self, tokenizer, query, history, past_key_values, **settings):
        self.calls.append({"query": query, "history": list(history), **settings})
        if query == "fail":
            raise RuntimeError("no memory <b>left</b>")
        if query == "silent":
            return
        if query.startswith("echo ") or query == "caches":
            answer = str(count_caches()) if query == "caches" else query.removeprefix("echo ")
            yield answer, [*history, (query, answer)], ChatGLMCache()
            return
        yield from self.model.stream_chat(
            tokenizer,
            query,
            history,
            past_key_values,
            do_sample=False,
            logits_processor=[pause] if "故事" in query else [],
            **settings,
        )


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
    utils.load_model = load_slow_model
    sys.argv = sys.argv[2:]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
