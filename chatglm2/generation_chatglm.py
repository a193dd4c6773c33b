"""Generation with ChatGLM2: the key/value cache, `generate`, and the original's `chat`.

Letters in shape comments: b batch, k keys, G key/value heads, d head size. This file is also
Hugging Face remote code.
"""

import atexit
import inspect
import queue
import threading

import torch
from transformers import (
    Cache,
    DynamicLayer,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

logger = logging.get_logger(__name__)

# How chat, stream_chat and every script sample; plain generate stays greedy, as the original.
CHAT_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.8,
    "max_length": 8192,
}

CACHE_SETTINGS = ("use_cache", "cache_implementation")  # of `generate`
# Name of the cache in arguments and outputs: transformers 5.24 renamed past_key_values.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
CACHE_BLOCK = 256  # tokens by which the capacity of a cache grows


def pick_cache(past_key_values, cache):
    """Return the cache that was given under either of its two names, or `None`.

    Raises:
        ValueError: Both names are given, with different caches.
    """
    if past_key_values is None or past_key_values is cache:
        return cache
    if cache is not None:
        raise ValueError("give the cache once: as past_key_values or as cache, not as both")
    return past_key_values


class ChatGLMCacheLayer(DynamicLayer):
    """Keys and values of one layer, [b, G, k, d]: views of buffers that grow in blocks.

    New tokens are written in place, so that a token costs what it weighs and not a copy of the
    cache.

    Attributes:
        buffers: `None`, or those of the keys and the values, contiguous [b, G, capacity, d], in the
            dtype that the first ones had (float32, float16 or bfloat16), whatever is written later.
    """

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.buffers = None

    def is_frozen(self) -> bool:
        """Whether the buffers were made in torch.inference_mode, outside of which they are read."""
        return self.buffers[0].is_inference() and not torch.is_inference_mode_enabled()

    def grow(self, length: int):
        """Make buffers for at least `length` tokens and copy what is held."""
        capacity = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        held = self.keys.shape[2]
        self.buffers = [
            x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (self.keys, self.values)
        ]
        for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
            buffer[:, :, :held] = old

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad:  # a gradient needs tensors that nobody overwrites
            self.buffers = None
            return super().update(key_states, value_states)
        held = self.extend(key_states.shape[2])
        for buffer, new in zip((self.keys, self.values), (key_states, value_states), strict=True):
            buffer[:, :, held:] = new
        return self.keys, self.values

    def reserve(self, count: int) -> int:
        """Let the buffers have room for `count` more tokens; return how many they hold."""
        held = self.keys.shape[2]
        length = held + count
        if self.buffers is None or self.buffers[0].shape[2] < length or self.is_frozen():
            self.grow(length)
        return held

    def extend(self, count: int) -> int:
        """Take in `count` more tokens, written by the caller; return where they begin."""
        held = self.reserve(count)
        self.keys, self.values = (buffer[:, :, : held + count] for buffer in self.buffers)
        return held

    # What makes new tensors leaves the buffers behind; the next update makes new ones.

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.buffers = None

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.buffers = None


class ChatGLMCache(Cache):
    """The key/value cache of a conversation: grows in blocks and knows what it holds.

    Attributes:
        input_ids: The ids whose keys and values are held, in order (batch size 1; set by
        `stream_chat`).
        pending_ids: The last generated id if it was not fed to the model yet and belongs to the
        answer.
        history: The rounds that the ids stand for, a list of (question, answer); `None` if unknown.
        prefix_length: Number of P-Tuning v2 keys in front, which are no tokens and not counted.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=ChatGLMCacheLayer)
        self.prefix_length = 0
        self.forget()

    def forget(self):
        self.input_ids, self.pending_ids, self.history = [], [], None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(super().get_seq_length(layer_idx) - self.prefix_length, 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int):
        """Drop the last `-tokens_to_remove` tokens (a negative number, as in transformers 5)."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.input_ids = self.input_ids[: self.get_seq_length()]
            self.pending_ids, self.history = [], None

    def reset(self):
        super().reset()
        self.prefix_length = 0
        self.forget()

    def is_consistent(self, num_layers: int) -> bool:
        """Whether all layers hold as many tokens; not so after an error within a forward.

        Args:
            num_layers: Of the model; of a first forward that failed, the later ones are missing.
        """
        lengths = [layer.get_seq_length() for layer in self.layers]
        return not any(lengths) or (len(set(lengths)) == 1 and len(lengths) == num_layers)

    def stands_for(self, history: list) -> bool:
        """Whether the next round of `history` can follow on what is held."""
        return bool(history) and self.history == history

    def continue_with(self, tokenizer, query: str, history: list) -> tuple[list[int], int]:
        """Return the ids of a conversation and how many of them are kept.

        If the cache stands for `history`, its ids (and a pending one) are followed by the new
        round. Otherwise the prompt is encoded anew and the longest common beginning is kept; the
        last id is always left to be computed. Nothing is changed yet: `crop` does that.
        """
        if self.stands_for(history):
            return self.input_ids + self.pending_ids + tokenizer.build_round(query, history), len(
                self.input_ids
            )
        ids = tokenizer.encode(tokenizer.build_prompt(query, history))
        kept = 0
        while kept < min(len(self.input_ids), len(ids) - 1) and self.input_ids[kept] == ids[kept]:
            kept += 1
        return ids, kept

    def copy_prefix(self, length: int) -> "ChatGLMCache":
        """Return a cache of the first `length` tokens, with buffers of its own."""
        copy = ChatGLMCache()
        copy.prefix_length, copy.input_ids = self.prefix_length, self.input_ids[:length]
        held = self.prefix_length + length
        for i, layer in enumerate(self.layers):
            copy.update(layer.keys[:, :, :held], layer.values[:, :, :held], i)
        return copy

    def record(self, ids: list[int], history: list, eos_token_ids):
        """Remember what a finished or stopped generation left: `ids` are prompt and answer."""
        held = self.get_seq_length()
        self.input_ids = ids[:held]
        self.pending_ids = [i for i in ids[held:] if i not in eos_token_ids]
        self.history = history


class RaggedCache(Cache):
    """The caches of several conversations as one batch, for a new token in each.

    Its update returns lists, of which `SelfAttention.attend` takes each row alone: nothing is
    padded, and a row is computed as if it were the only one.

    Args:
        rows: `ChatGLMCache`s that hold a token at least, of any lengths.
    """

    def __init__(self, rows: list[ChatGLMCache]):
        super().__init__(layers=rows[0].layers)
        self.rows = rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = zip(self.rows, key_states.split(1), value_states.split(1), strict=True)
        updated = [row.update(key, value, layer_idx) for row, key, value in states]
        return [key for key, _ in updated], [value for _, value in updated]


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Where a score is not finite, force id 5, as the original, instead of failing in sampling."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not torch.isfinite(scores).all():
            logger.warning_once(
                "The model computed NaN or infinity: broken or incomplete weights, or an overflow "
                "of float16 (try float32 or bfloat16)."
            )
            scores = torch.zeros_like(scores)
            scores[..., 5] = 5e4
        return scores


class StopOnEvent(StoppingCriteria):
    """Ends a generation once a `threading.Event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs
    ) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class TokenStreamer(BaseStreamer):
    """Hands over the ids of `generate` step by step, to be read by another thread.

    Iterating yields all ids so far, prompt included, [b, length], after each step.
    """

    def __init__(self):
        self.steps = queue.SimpleQueue()

    def put(self, value: torch.Tensor):
        self.steps.put(value)  # the prompt [b, length], then the new ids [b] or [b, n]

    def end(self):
        pass

    def finish(self, error: BaseException | None):
        """Tell the reader that no step follows, and why."""
        self.steps.put(error)

    def __iter__(self):
        sequences = None
        while isinstance(step := self.steps.get(), torch.Tensor):
            if sequences is None:
                sequences = step
                continue
            sequences = torch.cat((sequences, step.view(len(sequences), -1)), dim=1)
            yield sequences
        if step is not None:
            raise step


class AnswerDecoder:
    """Decodes a growing answer without decoding all of it at each step.

    What is decoded anew starts at the previous step that ended in a whole character, so that
    SentencePiece sees where spaces belong.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end, self.text = 0, 0, ""

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of all ids so far; `None` while it ends within a character."""
        known = self.tokenizer.decode(ids[self.start : self.end])
        window = self.tokenizer.decode(ids[self.start :])
        if window.endswith("\ufffd"):
            return None
        self.text += window[len(known) :]
        self.start, self.end = self.end, len(ids)
        return self.text


def decode_answer(tokenizer, ids: list[int]) -> str:
    """Decode generated ids, without an unfinished character at the end."""
    while ids and (text := tokenizer.decode(ids)).endswith("\ufffd"):
        ids = ids[:-1]
    return text if ids else ""


def read_history(history) -> list[tuple[str, str]]:
    """Return a history as a list of (question, answer).

    Raises:
        ValueError: It is not that, such as a list of messages with roles.
    """
    turns = list(history or [])
    for turn in turns:
        if not isinstance(turn, list | tuple) or [type(text) for text in turn] != [str, str]:
            raise ValueError(
                f"history is a list of (question, answer), not of {turn!r}; for messages with "
                "roles use tokenizer.apply_chat_template and generate."
            )
    return [tuple(turn) for turn in turns]


class ChatGLMGenerationMixin(GenerationMixin):
    """The methods of `ChatGLMForConditionalGeneration` that generate."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> dict:
        """As the library's; also says whether the tokens are a prompt's.

        Without a cache a prompt is computed anew for each token: then always exactly. Assisted
        generation (prompt lookup) can go on with a kept cache, of whose ids transformers 5.23
        passes all again.
        """
        cache = pick_cache(past_key_values, cache)
        held = 0 if cache is None else cache.get_seq_length()
        if next_sequence_length is None and held:
            positions = kwargs.get("position_ids")
            # Of new ids alone, there are more positions, or the first is not 0.
            has_all = positions is not None and positions.shape[-1] == input_ids.shape[1]
            if has_all and positions[0, 0] == 0:
                next_sequence_length = input_ids.shape[1] - held
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            cache,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )
        if is_first_iteration and cache is not None:
            inputs["is_prompt"] = True
        return inputs

    def generate(
        self, inputs=None, generation_config=None, past_key_values=None, cache=None, **kwargs
    ):
        """As the library's; the cache is a `ChatGLMCache` unless another kind is requested.

        The cache has two names: transformers 5.24 renamed `past_key_values` to `cache`.
        """
        cache = pick_cache(past_key_values, cache)
        settings = generation_config or self.generation_config
        kinds = [kwargs.get(name, getattr(settings, name)) for name in CACHE_SETTINGS]
        if cache is None and kinds == [True, None]:
            cache = ChatGLMCache()
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(inputs, generation_config, **kwargs)

    def process_response(self, response: str) -> str:
        """Strip the text and fill in the training date, as the original."""
        return response.strip().replace("[[训练时间]]", "2023年")

    def build_inputs(self, tokenizer, query: str, history=None):
        """Return the model inputs of a whole conversation, on the model's device, [1, s]."""
        return tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(
            self.device
        )

    def build_stream_inputs(self, tokenizer, query: str, history=None):
        """Return the model inputs of the new round alone; of a first round, the whole prompt."""
        if not history:
            return self.build_inputs(tokenizer, query)
        ids = tokenizer.build_round(query, history)
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self.device)

    def _chat_settings(
        self, tokenizer, prompt_length, num_kept, max_length, do_sample, temperature, top_p, kwargs
    ):
        """Return the arguments of `generate`, the length limit checked.

        Args:
            prompt_length: Number of ids before the answer, cached ones included.
            num_kept: How many of them a kept cache holds; `max_length` does not count them.

        Raises:
            ValueError: The prompt leaves no room for an answer.
        """
        if "stop_strings" in kwargs:
            kwargs["tokenizer"] = tokenizer
        context = self.config.seq_length
        if (max_new_tokens := kwargs.pop("max_new_tokens", None)) is not None:
            max_length = prompt_length - num_kept + max_new_tokens
        limit = min(num_kept + max_length, context)
        if prompt_length >= limit:
            raise ValueError(
                f"The prompt has {prompt_length - num_kept} tokens"
                + (f" after {num_kept} of the conversation so far" if num_kept else "")
                + f"; max_length is {max_length} and the context {context}: shorten the prompt or "
                "the history, or raise max_length."
            )
        settings = {"max_length": limit, "do_sample": do_sample and temperature > 0, **kwargs}
        if settings["do_sample"]:
            settings = {
                "top_k": CHAT_DEFAULTS["top_k"],
                **settings,
                "temperature": temperature,
                "top_p": top_p,
            }
        return settings

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str,
        history=None,
        max_length: int = CHAT_DEFAULTS["max_length"],
        num_beams: int = 1,
        do_sample: bool = CHAT_DEFAULTS["do_sample"],
        top_p: float = CHAT_DEFAULTS["top_p"],
        temperature: float = CHAT_DEFAULTS["temperature"],
        logits_processor: list | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a question.

        Args:
            history: Earlier rounds, a list of (question, answer); it is not changed.
            max_length: Number of tokens of prompt and answer together.
            temperature: 0 means greedy.
            kwargs: Further arguments of `generate`.

        Returns:
            The answer, and the history with the new round.

        Raises:
            ValueError: The prompt has `max_length` tokens or more, or fills the context.
        """
        history = read_history(history)
        input_ids = self.build_inputs(tokenizer, query, history)["input_ids"]
        prompt_length = input_ids.shape[1]
        settings = self._chat_settings(
            tokenizer, prompt_length, 0, max_length, do_sample, temperature, top_p, kwargs
        )
        sequences = self.generate(
            input_ids,
            num_beams=num_beams,
            past_key_values=ChatGLMCache(),
            logits_processor=LogitsProcessorList(
                [*(logits_processor or []), InvalidScoreLogitsProcessor()]
            ),
            **settings,
        )
        answer = decode_answer(tokenizer, sequences[0, prompt_length:].tolist())
        response = self.process_response(answer)
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history=None,
        past_key_values: Cache | None = None,
        max_length: int = CHAT_DEFAULTS["max_length"],
        do_sample: bool = CHAT_DEFAULTS["do_sample"],
        top_p: float = CHAT_DEFAULTS["top_p"],
        temperature: float = CHAT_DEFAULTS["temperature"],
        logits_processor: list | None = None,
        return_past_key_values: bool = False,
        prompt: tuple[list[int], int] | None = None,
        **kwargs,
    ):
        """Answer a question token by token: yield (answer so far, history[, cache]).

        Args:
            past_key_values: The cache that an earlier round returned. If it stands for `history`,
                only the new round is computed and `max_length` counts only that; if not, what both
                have in common is kept and the rest computed anew.
            return_past_key_values: Also yield the cache, for the next round.
            prompt: The result of `past_key_values.continue_with` for this question, from a caller
                that has counted its ids; `max_length` then counts them all.

        The other arguments are those of `chat`. Closing the generator ends the generation, and the
        cache then stands for the history yielded last. A partial answer never ends in half a
        character.

        Raises:
            ValueError: As `chat`.
        """
        history = read_history(history)
        cache = past_key_values if isinstance(past_key_values, ChatGLMCache) else ChatGLMCache()
        ids, num_kept = prompt or cache.continue_with(tokenizer, query, history)
        num_free = num_kept if prompt is None and cache.stands_for(history) else 0
        settings = self._chat_settings(
            tokenizer, len(ids), num_free, max_length, do_sample, temperature, top_p, kwargs
        )
        cache.crop(num_kept - cache.get_seq_length())
        cache.history = None
        steps = self.stream_generate(
            torch.tensor([ids], device=self.device),
            past_key_values=cache,
            logits_processor=LogitsProcessorList(
                [*(logits_processor or []), InvalidScoreLogitsProcessor()]
            ),
            **settings,
        )
        decoder, shown, response = AnswerDecoder(tokenizer), None, ""
        try:
            for sequences in steps:
                if text := decoder.decode(sequences[0, len(ids) :].tolist()):
                    shown = sequences
                    response = self.process_response(text)
                    step = (response, [*history, (query, response)])
                    yield (*step, cache) if return_past_key_values else step
        finally:
            steps.close()
            shown_ids = ids if shown is None else shown[0].tolist()
            if cache.is_consistent(self.config.num_layers):
                # generate may be ahead of what was yielded
                cache.crop(min(len(shown_ids) - 1 - cache.get_seq_length(), 0))
                cache.record(shown_ids, [*history, (query, response)], self.eos_token_ids)
            else:
                cache.reset()

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer."""
        ids = self.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def stream_generate(
        self,
        input_ids: torch.LongTensor,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        return_past_key_values: bool = False,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Run `generate` in a thread and yield all ids so far, [b, length], after each step.

        Closing the generator ends the generation within a token. With `return_past_key_values`,
        yield (ids, cache); the thread goes on meanwhile, so the cache may be ahead of the ids. The
        other arguments are those of `generate` (beam search cannot be streamed).
        """
        cache = pick_cache(past_key_values, cache)
        cache = ChatGLMCache() if cache is None else cache
        streamer, stop, device = TokenStreamer(), threading.Event(), self.device.type
        is_autocast = torch.is_autocast_enabled(device)  # of this thread; the other has its own
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), is_autocast)

        def run():
            error = None
            try:
                with autocast:
                    self.generate(
                        input_ids,
                        generation_config=generation_config,
                        logits_processor=logits_processor,
                        stopping_criteria=StoppingCriteriaList(
                            [*(stopping_criteria or []), StopOnEvent(stop)]
                        ),
                        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                        past_key_values=cache,
                        streamer=streamer,
                        **kwargs,
                    )
            except BaseException as exception:  # handed to the reader
                error = exception
            streamer.finish(error)

        thread = threading.Thread(target=run, daemon=True)

        def end():
            stop.set()
            thread.join()

        atexit.register(end)  # a thread within torch must not outlive the interpreter
        thread.start()
        try:
            for sequences in streamer:
                yield (sequences, cache) if return_past_key_values else sequences
        finally:
            end()
            atexit.unregister(end)
