"""What the two web pages share: one model that answers in turn, text as Markdown, words."""

import logging
import os
import re
import time
import weakref
from contextlib import closing, contextmanager
from functools import lru_cache

from markdown_it import MarkdownIt

import machine
import utils
from chatglm2 import CHAT_DEFAULTS
from conversation import DROPPED, STOPPED, Conversation

MAX_CACHES = 4  # one of 8192 tokens of the 6B model in float16 has 0.24 GB
POLL_S = 0.1
MIN_INTERVAL_S = 0.05  # between two steps that a page draws: drawing takes time from computing
WELCOME = "你好 👋 有什么可以帮你？\n\nHello! How can I help you?"
EXAMPLES = ("你好", "晚上睡不着应该怎么办", "Tell me a joke")

GRADIO_LATEX = [
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]
GRADIO_HEAD = """
<style>.katex-display {overflow-x: auto; overflow-y: hidden}</style>
<!-- Whatever a text makes the browser show, it asks no other host. -->
<meta http-equiv="Content-Security-Policy"
    content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">"""

PARSER = MarkdownIt("commonmark").disable(["html_block", "html_inline", "reference"])
CODE_SPAN = re.compile(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
SPECIAL = re.compile(
    r"\\\[(?P<display>(?:[^\\]|\\[^\[\]])+?)\\\]|\$\$(?P<dollars>.+?)\$\$"
    r"|\\\((?P<inline>(?:[^\\]|\\[^()])+?)\\\)"  # none in another: the time would be quadratic
    r"|(?<![a-zA-Z\d$])\$(?P<dollar>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![a-zA-Z\d$])"  # no prices
    r"|\\?(?P<tag><)|\\(?P<escaped>.)|(?P<image>!\[)|(?P<footnote>\[\^)|(?P<newline>\n)"
    r"|(?P<price>\$)|(?P<colon>:(?=[a-z]))",
    re.DOTALL,
)
# A display formula of several lines; Markdown would take some of them for items or headings.
FORMULA = re.compile(
    r"^ {0,3}(?:\\\[(?:(?!\n[ \t]*\n)(?:[^\\]|\\[^\[\]]))+?\\\]"
    r"|\$\$(?:(?!\n[ \t]*\n)[^$])+\$\$)",
    re.MULTILINE,
)
ALONE = re.compile(r"^ {0,3}\$\$([^$\n]+)\$\$ *$", re.MULTILINE)
# What `SPECIAL` finds, as each library's Markdown writes it.
GRADIO = {
    "display": r"\[{}\]",
    "inline": r"\({}\)",
    "image": "!&#91;",
    "footnote": "&#91;^",
    "newline": "\n",
    "price": "$",
    "colon": ":",
    "dollars": r"\g<0>",
    "alone": r"\g<0>",
    "<": "&lt;",
}
STREAMLIT = {
    "display": "$${}$$",
    "inline": "${}$",
    "image": "!&#91;",
    "footnote": "&#91;^",
    "newline": "  \n",
    "price": r"\$",
    "colon": "&#58;",  # of `:red[...]`, `:smile:`
    "dollars": r"\\textdollar ",
    "alone": r"$$\n\1\n$$",  # otherwise it would be drawn as in a line of text
    "<": "<",
}

logger = logging.getLogger(__name__)


class Chat(Conversation):
    """A conversation of a page.

    Attributes:
        query: The question that has no answer yet, or "".
        notice: What is to be told of the last answer, or "".
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
        """Close the generator of an answer in the end; meanwhile `end_answer` waits."""
        self.is_busy = True
        try:
            with closing(steps):
                yield steps
        finally:
            self.is_busy = False

    def end_answer(self):
        """End the answer that another thread draws, if any, and wait for it."""
        while self.is_busy:
            self.is_stopped = True
            time.sleep(POLL_S)

    def leave(self):
        """End the answer and free the cache: nobody looks any more."""
        self.end_answer()
        self.free_cache()

    @property
    def notices(self) -> list[str]:
        dropped = DROPPED.format(self.first_round) if self.first_round else ""
        return [notice for notice in (dropped, self.notice) if notice]


class SharedModel:
    """One model for several chats: it answers them in turn, and the latest caches are kept."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.queue = []  # a ticket for each question; the first one is being answered
        self.recent = []  # weak references to the chats whose caches are kept

    def start_chat(self) -> Chat:
        return Chat(self.model, self.tokenizer)

    def answer(self, chat: Chat, query: str, max_length: int, **sampling):
        """Answer a question: a generator that yields whenever a page has something new to draw.

        Closing it or setting `chat.is_stopped` ends the answer; what there is of it is kept. A
        failure becomes the chat's notice.
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
            chat.notice = STOPPED if chat.is_stopped else ""
            if not chat.is_stopped:
                yield from self.answer_now(chat, max_length, sampling)
        except GeneratorExit:
            chat.notice = STOPPED
            raise
        except ValueError as error:  # too long a question
            chat.notice = str(error)
        except Exception as error:
            logger.exception("an answer failed")
            chat.notice = f"回答失败 / the answer failed: {utils.one_line(error)}"
        finally:
            self.queue.remove(ticket)

    def answer_now(self, chat: Chat, max_length: int, sampling: dict):
        room, _ = chat.make_room(chat.query, max_length)
        self.keep_cache(chat)
        yield
        drawn = 0
        with closing(chat.stream(chat.query, room, **sampling)) as answers:
            for _ in answers:
                chat.query = ""
                if chat.is_stopped:
                    chat.notice = STOPPED
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


@lru_cache(maxsize=1000)
def to_markdown(text: str, library: str) -> str:
    """Return a user's or a model's Markdown so that `library` shows it as it is meant.

    HTML tags and images are shown as they are written: nothing of the text becomes HTML, and it
    makes no browser ask another host. Formulas get the library's delimiters. Code stays as it is.
    """
    style = {"gradio": GRADIO, "streamlit": STREAMLIT}[library]
    text = join_formulas(text)
    lines = text.split("\n")
    for token in reversed(PARSER.parse(text)):
        if token.type == "inline":  # the text of a paragraph, a heading or an item
            part = convert("\n".join(lines[slice(*token.map)]), token, style)
            lines[slice(*token.map)] = [
                ALONE.sub(style["alone"], part) if token.level == 1 else part
            ]
        elif token.type == "fence":
            first = token.map[0]
            lines[first] = re.sub("[<!]", "", lines[first])  # not part of a language's name
    return "\n".join(lines)


def join_formulas(text: str) -> str:
    """Put each display formula on one line, but nothing of code."""
    if not FORMULA.search(text):
        return text
    lines, result, end = text.split("\n"), [], 0
    codes = [token.map for token in PARSER.parse(text) if token.type in ("fence", "code_block")]
    for first, last in (*codes, (len(lines), len(lines))):
        part = "\n".join(lines[end:first])
        result += [FORMULA.sub(lambda found: join_lines(found[0]), part)] if first > end else []
        result, end = result + lines[first:last], last
    return "\n".join(result)


def join_lines(formula: str) -> str:
    return re.sub(r"\s*\n[\s>]*", " ", formula)


def convert(text: str, token, style: dict[str, str]) -> str:
    """Replace what is special in all of a paragraph but its code spans."""
    spans = list(CODE_SPAN.finditer(text))
    codes = [child.content for child in token.children if child.type == "code_inline"]
    if [span[2].replace("\n", " ").strip() for span in spans] != [code.strip() for code in codes]:
        spans = []  # in doubt: an entity within code is better than a tag outside of it
    result, end = "", 0
    for span in spans:
        result += SPECIAL.sub(lambda found: replace(found, style), text[end : span.start()])
        result, end = result + join_lines(span[0]), span.end()
    return result + SPECIAL.sub(lambda found: replace(found, style), text[end:])


def replace(found: re.Match, style: dict[str, str]) -> str:
    body = found[found.lastgroup].replace("<", style["<"])
    match found.lastgroup:
        case "display" | "dollars":
            return style["display"].format(formula(body, style))
        case "inline" | "dollar":
            return style["inline"].format(formula(body, style))
        case "escaped":  # what begins a formula, but does not end, would to Gradio in later code
            return f"&#{ord(body)};" if body in "[]()" else "\\" + body
        case "tag":
            return body
    return style[found.lastgroup]


def formula(body: str, style: dict[str, str]) -> str:
    """Return TeX that has no image, footnote or end of a formula to any Markdown parser."""
    body = join_lines(body).replace("![", "! [").replace("[^", "[ ^")
    return re.sub(r"\$+", style["dollars"], body)


def describe(name: str, model) -> str:
    """Return a line with the model's name, its device and precision."""
    return f"{name}, {model.device}, {utils.name_precision(model)}"


def sampling_sliders(model) -> dict[str, dict]:
    """Return a slider's label, bounds, default and step for each setting of an answer."""
    context = model.config.seq_length
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
            "value": min(CHAT_DEFAULTS[name], maximum),
            "step": step,
        }
        for name, (label, minimum, maximum, step) in sliders.items()
    }


def check_address(host: str, port: int | None):
    """Exit if nothing can listen there; let this process ask its own server without a proxy."""
    try:
        machine.listen(host, port or 0).close()
    except OSError as error:
        raise SystemExit(cannot_serve(host, port, error)) from error
    for name in ("no_proxy", "NO_PROXY"):
        hosts = (os.environ.get(name), "127.0.0.1", "localhost", host)
        os.environ[name] = ",".join(filter(None, hosts))


def cannot_serve(host: str, port: int | None, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or utils.one_line(error)
    where = f"--port {port}" if port else "any port from 7860 to 7959"
    return f"cannot serve at --host {host}, {where}: {reason}; choose another --host or --port"
