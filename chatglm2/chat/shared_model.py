"""What the two web pages share: one model for all chats, example questions, sliders."""

import asyncio
import logging
import time
from dataclasses import dataclass, field

from chatglm2 import CHAT_DEFAULTS
from chatglm2.errors import one_line
from chatglm2.sampling_chatglm import read_sampling
from chatglm2.serving.batching import Batcher, Chunk, Generation, Request, Unavailable

from .conversation import Conversation, compute_limit, drop_oldest

KEPT_TOKENS = 32768  # with the 6B model in float16 they need 0.9 GB
INTERVAL_S = 0.05  # between two drawn steps: drawing takes time from computing
WELCOME = "你好 👋 有什么可以帮你？\n\nHello! How can I help you?"
EXAMPLES = ("你好", "晚上睡不着应该怎么办", "Tell me a joke")
EDITING = (
    "正在修改第 {0} 个问题，发送后会替换其后的对话（Esc 取消）/ "
    "editing question {0}: sending it replaces what follows (Esc gives up)"
)

logger = logging.getLogger(__name__)


@dataclass
class Chat:
    """A conversation of a page.

    Attributes:
        rounds: All rounds, a list of [question, answer, remark]; a remark is "36 tokens" and such.
        first_round: Index of the first round that the model still sees; the older ones were
            dropped.
        system: Text that stands before the first question, or "".
        query: The question that has no answer yet, or "".
        notice: A remark on the last answer, or "".
        is_stopped: Set this to end the answer, from any thread.
    """

    rounds: list[list[str]] = field(default_factory=list)
    first_round: int = 0
    system: str = ""
    query: str = ""
    notice: str = ""
    is_stopped: bool = False

    def cut(self, index: int) -> str:
        """Remove the rounds from this index on, and return the question of the first; or ""."""
        query = self.rounds[index][0] if self.rounds else ""
        del self.rounds[index:]
        if self.first_round >= len(self.rounds):
            self.first_round = 0
        return query

    @property
    def notices(self) -> list[str]:
        dropped = Conversation.DROPPED.format(self.first_round) if self.first_round else ""
        return [notice for notice in (dropped, self.notice) if notice]

    def list_messages(self, rounds: list) -> list[dict]:
        """Return the system text and rounds as messages with roles."""
        texts = [("system", self.system)] if self.system else []
        for question, answer, *_ in rounds:
            texts += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in texts]

    def encode(self, tokenizer, query: str, rounds: list) -> list[int]:
        """Return the prompt: the system text, rounds, and a question."""
        messages = [*self.list_messages(rounds), {"role": "user", "content": query}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


class GrowingAnswer:
    """Receives the chunks of an answer from the batcher, in the place of a queue."""

    def __init__(self):
        self.whole, self.error = Chunk(), None
        self.begin = self.end = 0.0  # when the first and the last token came

    def put_nowait(self, item: tuple[int, Chunk | Exception]):
        _, chunk = item
        if isinstance(chunk, Exception):
            self.error = chunk
            return
        self.whole.add(chunk)
        self.end = time.monotonic()
        self.begin = self.begin or self.end

    @property
    def remark(self) -> str:
        """For example "36 tokens · 20.5 tokens/s"; the speed is that after the first token."""
        count, duration = len(self.whole.token_ids), self.end - self.begin
        speed = f" · {(count - 1) / duration:.1f} tokens/s" if count > 1 and duration else ""
        return f"{count} token{'s' * (count != 1)}{speed}"


class SharedModel:
    """One model for several chats; it answers some of them at the same time."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        context = model.config.seq_length
        self.batcher = Batcher(model, tokenizer, context=context, kept_tokens=KEPT_TOKENS)

    async def answer(self, chat: Chat, query: str, max_length: int, **sampling):
        """Answer a question: a generator that yields whenever a page has something new to draw.

        Closing it or setting `chat.is_stopped` ends the answer; the text so far is kept. A failure
        becomes the chat's notice.

        Args:
            max_length: Number of tokens of the conversation, bounded by the model's context.
            sampling: `top_p` and `temperature`.
        """
        chat.query, chat.notice, chat.is_stopped = query, "", False
        growing, generation = GrowingAnswer(), None
        try:
            yield
            ids = await asyncio.to_thread(self.fit, chat, query, max_length)
            request = Request(
                ids, max_length=max_length, process_text=self.model.process_response, **sampling
            )
            generation = self.batcher.submit(request, growing)
            async for _ in self.follow(chat, generation, growing):
                yield
        except GeneratorExit:
            chat.notice = Conversation.STOPPED
            raise
        except (ValueError, Unavailable) as error:  # too long a question, too many questions
            chat.notice = str(error)
        except Exception as error:
            logger.exception("an answer failed")
            chat.notice = f"回答失败 / the answer failed: {one_line(error)}"
        finally:
            if generation:
                generation.cancel()

    def fit(self, chat: Chat, query: str, max_length: int) -> list[int]:
        """Return the prompt; drop the oldest rounds that leave too little room for an answer."""
        rounds = chat.rounds[chat.first_round :]
        ids, rounds = drop_oldest(
            lambda rounds: chat.encode(self.tokenizer, query, rounds),
            rounds,
            compute_limit(min(max_length, self.batcher.context)),
        )
        chat.first_round = len(chat.rounds) - len(rounds)
        return ids

    async def follow(self, chat: Chat, generation: Generation, growing: GrowingAnswer):
        """Copy a growing answer into its chat; yield after each change."""
        whole, drawn = growing.whole, None
        while not chat.is_stopped:
            is_last = whole.finish_reason is not None
            if growing.error:
                raise growing.error
            if whole.text and chat.query:
                chat.rounds.append([chat.query, "", ""])
                chat.query = ""
            if not chat.query:
                chat.rounds[-1][1:] = whole.text, growing.remark
            chat.notice = self.describe_place(generation)
            if is_last:
                break
            if drawn != (drawn := (whole.text, chat.notice)):
                yield
            await asyncio.sleep(INTERVAL_S)
        if chat.is_stopped:
            chat.notice = Conversation.STOPPED
        elif chat.query:
            chat.notice = "模型没有回答 / the model gave no answer"
        elif whole.finish_reason == "length":
            chat.notice = "回答达到长度上限，已截断 / the answer was cut: maximum length reached"

    def describe_place(self, generation: Generation) -> str:
        """Return how many answers must end before this one begins; "" if there is a place."""
        with self.batcher.condition:
            waiting = list(self.batcher.waiting)
            num_free = self.batcher.max_batch - len(self.batcher.running)
        ahead = waiting.index(generation) + 1 - num_free if generation in waiting else 0
        if ahead <= 0:
            return ""
        questions = "1 question comes" if ahead == 1 else f"{ahead} questions come"
        return f"排队中，前面还有 {ahead} 个问题 / waiting: {questions} first"


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
