"""What the two web pages share: one model for all chats, example questions, sliders."""

import logging
import time
import weakref
from contextlib import closing, contextmanager

from chatglm2 import CHAT_DEFAULTS
from chatglm2.errors import one_line
from chatglm2.sampling_chatglm import read_sampling

from .conversation import Conversation

MAX_CACHES = 4  # 8192 tokens of the 6B model in float16 need 0.24 GB
POLL_S = 0.1
MIN_INTERVAL_S = 0.05  # between two drawn steps: drawing takes time from computing
WELCOME = "你好 👋 有什么可以帮你？\n\nHello! How can I help you?"
EXAMPLES = ("你好", "晚上睡不着应该怎么办", "Tell me a joke")

logger = logging.getLogger(__name__)


class Chat(Conversation):
    """A conversation of a page.

    Attributes:
        query: The question that has no answer yet, or "".
        notice: A remark on the last answer, or "".
        is_stopped: Set this to end the answer.
    """

    is_busy = False

    def clear(self):
        self.end_answer()
        super().clear()
        self.query = self.notice = ""
        self.is_stopped = False

    def pop(self) -> str:
        self.end_answer()
        return super().pop()

    @contextmanager
    def busy(self, steps):
        """Close the generator of an answer at the end; until then `end_answer` waits."""
        self.is_busy = True
        try:
            with closing(steps):
                yield steps
        finally:
            self.is_busy = False

    def end_answer(self):
        """End the answer that another thread draws, if there is one, and wait for its end."""
        while self.is_busy:
            self.is_stopped = True
            time.sleep(POLL_S)

    def leave(self):
        """End the answer and free the cache: the tab was closed."""
        self.end_answer()
        self.free_cache()

    @property
    def notices(self) -> list[str]:
        dropped = self.DROPPED.format(self.first_round) if self.first_round else ""
        return [notice for notice in (dropped, self.notice) if notice]


class SharedModel:
    """One model for several chats: it answers one at a time and keeps the latest caches."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.queue = []  # a ticket for each question; the first one is being answered
        self.recent = []  # weak references to the chats whose caches are kept

    def start_chat(self) -> Chat:
        return Chat(self.model, self.tokenizer)

    def answer(self, chat: Chat, query: str, max_length: int, **sampling):
        """Answer a question: a generator that yields whenever a page has something new to draw.

        Closing it or setting `chat.is_stopped` ends the answer; the text so far is kept. A failure
        becomes the chat's notice.
        """
        chat.query, chat.notice, chat.is_stopped = query, "", False
        ticket = object()
        self.queue.append(ticket)
        try:
            while (ahead := self.queue.index(ticket)) and not chat.is_stopped:
                questions = "1 question comes" if ahead == 1 else f"{ahead} questions come"
                chat.notice = f"排队中，前面还有 {ahead} 个问题 / waiting: {questions} first"
                yield
                time.sleep(POLL_S)
            chat.notice = chat.STOPPED if chat.is_stopped else ""
            if not chat.is_stopped:
                yield from self.answer_now(chat, max_length, sampling)
        except GeneratorExit:
            chat.notice = chat.STOPPED
            raise
        except ValueError as error:  # the question is too long
            chat.notice = str(error)
        except Exception as error:
            logger.exception("an answer failed")
            chat.notice = f"回答失败 / the answer failed: {one_line(error)}"
        finally:
            self.queue.remove(ticket)

    def answer_now(self, chat: Chat, max_length: int, sampling: dict):
        answers = chat.stream(chat.query, max_length, **sampling)
        self.keep_cache(chat)
        yield
        drawn = 0
        with closing(answers):
            for _ in answers:
                chat.query = ""
                if chat.is_stopped:
                    chat.notice = chat.STOPPED
                    return
                if time.monotonic() - drawn >= MIN_INTERVAL_S:
                    yield
                    drawn = time.monotonic()
        if chat.query:
            chat.notice = "模型没有回答 / the model gave no answer"
        elif chat.was_cut:
            chat.notice = "回答达到长度上限，已截断 / the answer was cut: maximum length reached"

    def keep_cache(self, chat: Chat):
        """Free the caches that were used longest ago, but not this one."""
        others = [other for ref in self.recent if (other := ref()) not in (None, chat)]
        chats = [other for other in others if other.cache.get_seq_length()]  # not freed meanwhile
        for other in chats[: max(0, len(chats) + 1 - MAX_CACHES)]:
            other.free_cache()
        self.recent = [weakref.ref(kept) for kept in (*chats, chat)][-MAX_CACHES:]


def sampling_sliders(model) -> dict[str, dict]:
    """Return label, bounds, default and step of the slider of each sampling setting."""
    context, defaults = model.config.seq_length, read_sampling(model.generation_config)
    defaults["max_length"] = CHAT_DEFAULTS["max_length"]
    sliders = {
        "max_length": ("最大长度 Maximum length", min(64, context), context, 1),
        "top_p": ("Top P", 0.0, 1.0, 0.01),
        "temperature": ("温度 Temperature", 0.0, 2.0, 0.01),
    }
    return {
        name: {
            "label": label,
            "minimum": minimum,
            "maximum": maximum,
            "value": min(defaults[name], maximum),
            "step": step,
        }
        for name, (label, minimum, maximum, step) in sliders.items()
    }
