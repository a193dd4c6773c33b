"""Generation with ChatGLM2: the key/value cache, streaming, `generate`, `chat` and `stream_chat`.

Letters in shape comments: b batch, k keys, G key/value heads, d head size. This file is also
Hugging Face remote code.
"""

import atexit
import copy
import inspect
import queue
import threading

import torch
from transformers import (
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .sampling_chatglm import (
    CHAT_DEFAULTS,
    PLAIN_SAMPLING,
    SAMPLING_ONLY,
    InvalidScoreLogitsProcessor,
    VocabularyLogitsProcessor,
    as_ids,
    create_sampler,
    find_end,
    find_end_ids,
    own_settings,
    read_fields,
    read_sampling,
)

# Name of the cache in arguments and outputs: transformers 5.24 renamed past_key_values.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
CACHE_BLOCK = 256  # tokens by which the capacity of a cache grows
RUNNING = set()  # for each answer that is being streamed, the function that ends it


@atexit.register
def end_streams():
    """End all answers: Python crashes if it exits while a thread computes."""
    for end in [*RUNNING]:
        end()


def pick_cache(past_key_values, cache):
    """Return the cache that is given under one of its two names, or `None`.

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

    New tokens are written in place, so a step does not copy the cache.

    Attributes:
        buffers: The buffers of keys and values, contiguous [b, G, capacity, d], or `None`. They
            keep the dtype of the first keys and values.
    """

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.buffers = None

    def is_frozen(self) -> bool:
        """True if the buffers were created in torch.inference_mode, which only allows reading."""
        return self.buffers[0].is_inference() and not torch.is_inference_mode_enabled()

    def grow(self, length: int):
        """Create buffers for at least `length` tokens and copy the keys and values."""
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
        if key_states.requires_grad:  # the backward pass needs tensors that are not overwritten
            self.buffers = None
            return super().update(key_states, value_states)
        held = self.extend(key_states.shape[2])
        for buffer, new in zip((self.keys, self.values), (key_states, value_states), strict=True):
            buffer[:, :, held:] = new
        return self.keys, self.values

    def reserve(self, count: int) -> int:
        """Make room for `count` more tokens; return the number of tokens held."""
        held = self.keys.shape[2]
        length = held + count
        if self.buffers is None or self.buffers[0].shape[2] < length or self.is_frozen():
            self.grow(length)
        return held

    def extend(self, count: int) -> int:
        """Add `count` tokens, which the caller writes; return the position of the first."""
        held = self.reserve(count)
        self.keys, self.values = (buffer[:, :, : held + count] for buffer in self.buffers)
        return held

    # These methods replace the tensors, so the next update creates new buffers.

    def reset(self):
        super().reset()
        self.buffers = None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.buffers = None

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.buffers = None


class ChatGLMCache(DynamicCache):
    """The key/value cache of a conversation, with the tokens and rounds that it holds.

    It is a `DynamicCache` for libraries that accept no other, such as PEFT's prefix tuning.

    Attributes:
        input_ids: The tokens whose keys and values are held, set by `stream_chat` (batch size 1).
        pending_ids: The last token of the answer, if the model has not computed its key yet.
        history: The rounds that these tokens represent, a list of (question, answer); `None` if
            they are not known.
        prefix_length: Number of P-Tuning v2 keys at the front. They are not counted as tokens.
    """

    def __init__(self):
        Cache.__init__(self, layer_class_to_replicate=ChatGLMCacheLayer)
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
        """True unless a step failed after some of the layers had stored their keys."""
        lengths = [layer.get_seq_length() for layer in self.layers]
        return not any(lengths) or (len(set(lengths)) == 1 and len(lengths) == num_layers)

    def stands_for(self, history: list) -> bool:
        """True if the cache holds exactly `history`, so that its next round can be appended."""
        return bool(history) and self.history == history

    def continue_with(self, tokenizer, query: str, history: list) -> tuple[list[int], int]:
        """Return the ids of the prompt, and how many of them the cache can keep.

        If the cache holds `history`, the new round is appended to its ids. Otherwise the whole
        prompt is encoded, and the longest common beginning is kept except for the last id, whose
        logits are needed. The cache is not changed: call `crop` to drop the other ids.
        """
        if self.stands_for(history):
            new_ids = self.pending_ids + tokenizer.build_round(query, history)
            return self.input_ids + new_ids, len(self.input_ids)
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
        """Store which conversation the cache holds after a generation.

        Args:
            ids: Prompt and answer; the cache may lack the last one.
            history: The rounds that the ids represent.
            eos_token_ids: Ids that end an answer, which are no part of it.
        """
        held = self.get_seq_length()
        self.input_ids = ids[:held]
        self.pending_ids = [i for i in ids[held:] if i not in eos_token_ids]
        self.history = history


class RaggedCache(Cache):
    """The caches of several conversations as one batch, for one new token in each.

    `update` returns a list of keys and a list of values. `SelfAttention.attend` computes each row
    alone, so nothing is padded and a row does not depend on the others.

    Args:
        rows: `ChatGLMCache`s of any lengths, at least one token each.
    """

    def __init__(self, rows: list[ChatGLMCache]):
        super().__init__(layers=rows[0].layers)
        self.rows = rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = zip(self.rows, key_states.split(1), value_states.split(1), strict=True)
        updated = [row.update(key, value, layer_idx) for row, key, value in states]
        return [key for key, _ in updated], [value for _, value in updated]


class StopOnEvent(StoppingCriteria):
    """Ends a generation once a `threading.Event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class TokenStreamer(BaseStreamer):
    """Passes the ids of `generate` to another thread.

    Iterating yields all ids so far, prompt included, [b, length], after each step.
    """

    def __init__(self):
        self.steps = queue.SimpleQueue()

    def put(self, value: torch.Tensor):
        self.steps.put(value)  # the prompt [b, length], then the new ids [b] or [b, n]

    def end(self):
        pass

    def finish(self, error: BaseException | None):
        """End the iteration, and raise `error` in the reader unless it is `None`."""
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

    Each step decodes from the start of the last step that added text, all of whose characters were
    whole, because SentencePiece drops a leading space at the start of a text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end, self.text = 0, 0, ""

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of all ids so far; `None` if it ends with half a character."""
        known = self.tokenizer.decode(ids[self.start : self.end])
        window = self.tokenizer.decode(ids[self.start :])
        if window.endswith("\ufffd"):
            return None
        if window != known:  # not at an id without text, such as a special token
            self.text += window[len(known) :]
            self.start = self.end
        self.end = len(ids)
        return self.text


def decode_answer(tokenizer, ids: list[int]) -> str:
    """Decode generated ids, without half a character at the end."""
    while ids and (text := tokenizer.decode(ids)).endswith("\ufffd"):
        ids = ids[:-1]
    return text if ids else ""


def read_setting(name: str, kwargs: dict, *configs):
    """Return an argument of `generate`: the given one, else that of the first config with one."""
    if name in kwargs:
        return kwargs[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def read_history(history) -> list[tuple[str, str]]:
    """Return a history as a list of (question, answer).

    Raises:
        ValueError: It is anything else, such as a list of messages with roles.
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
    """The methods of `ChatGLMForConditionalGeneration` that generate.

    transformers recognizes a model that can generate by a base class named `...GenerationMixin`.
    """

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
        """Prepare a step like `GenerationMixin`.

        With assisted generation (prompt lookup) transformers passes all ids again, also those that
        a kept cache holds; they are cut off here.
        """
        kwargs.pop("tokenizer", None)  # transformers gives the model this argument of generate
        cache = pick_cache(past_key_values, cache)
        held = 0 if cache is None else cache.get_seq_length()
        if next_sequence_length is None and held:
            if attention_mask is not None:  # it is for the cached ids, too
                has_all = attention_mask.shape[-1] == input_ids.shape[1]
            else:  # no id is padding: the first new position is not 0
                positions = kwargs.get("position_ids")
                has_all = positions is not None and positions.shape[-1] == input_ids.shape[1]
                has_all = has_all and positions[0, 0] == 0
            if has_all:
                next_sequence_length = input_ids.shape[1] - held
        states = cache, attention_mask, inputs_embeds, is_first_iteration
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, *states, **kwargs
        )
        # PEFT's prefix tuning looks for the cache under this name, and puts its prefix there.
        inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        return inputs

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        *args,
        past_key_values=None,
        cache=None,
        tokenizer=None,
        **kwargs,
    ):
        """Generate like `GenerationMixin`, with a `ChatGLMCache` unless another is requested.

        Args:
            cache: The name of `past_key_values` since transformers 5.24.
            tokenizer: With it, only ids of the tokenizer are generated: the output matrix has more
                rows. It is also asked for the end of an answer, and needed for `stop_strings`.

        With the common settings `SamplingLogitsProcessor` samples, see `create_sampler`.

        Raises:
            ValueError: A cache in use is no `ChatGLMCache`, and the model has a P-Tuning v2 prefix,
                which transformers would count as tokens.
        """
        cache = pick_cache(past_key_values, cache)
        has_prefix = self.config.pre_seq_len is not None
        if has_prefix and not isinstance(cache, ChatGLMCache | None) and cache.get_seq_length():
            raise ValueError(
                f"a {type(cache).__name__} cannot be continued with a P-Tuning v2 prefix: use a "
                "ChatGLMCache"
            )
        use_cache, kind = (
            read_setting(name, kwargs, generation_config, self.generation_config)
            for name in ("use_cache", "cache_implementation")
        )
        if cache is None and use_cache is not False and kind is None:
            cache = ChatGLMCache()
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        given = {} if generation_config is None else read_fields(generation_config)
        fields = read_fields(self.generation_config) | given | kwargs
        processors, changed = [*(logits_processor or [])], {}
        if "eos_token_id" not in kwargs:
            changed["eos_token_id"] = self.find_end_ids(tokenizer, generation_config)
        if tokenizer is not None:
            processors.insert(0, VocabularyLogitsProcessor(len(tokenizer)))
            kwargs["tokenizer"] = tokenizer
        if not args and (sampler := create_sampler(fields)):
            processors.append(sampler)
            changed |= PLAIN_SAMPLING | {"do_sample": False}
            kwargs = {k: v for k, v in kwargs.items() if k not in changed}
        if generation_config is None:
            kwargs |= changed
        elif changed:  # transformers warns of both, a generation_config and its fields
            generation_config = copy.copy(generation_config)
            generation_config.update(**changed)
        processors = LogitsProcessorList(processors) if processors else None
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def find_end_ids(self, tokenizer=None, generation_config=None) -> list[int]:
        """Return the ids that end an answer.

        Asked in turn: `generation_config`, the checkpoint's generation_config.json and config.json,
        the tokenizer, the default of `ChatGLMConfig`. Ids that are no tokens do not count.
        """
        config = self.config
        sources = generation_config, self.generation_config, config, tokenizer, type(config)
        num_ids = config.padded_vocab_size if tokenizer is None else len(tokenizer)
        return find_end_ids(*sources, num_ids=num_ids)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer, as far as the model knows without a tokenizer."""
        return self.find_end_ids()

    def process_response(self, response: str) -> str:
        """Strip the text and fill in the training date, as the original."""
        return response.strip().replace("[[训练时间]]", "2023年")

    def build_inputs(self, tokenizer, query: str, history=None):
        """Return the model inputs of a whole conversation, on the model's device, [1, s]."""
        inputs = tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt")
        return inputs.to(self.device)

    def build_stream_inputs(self, tokenizer, query: str, history=None):
        """Return the model inputs of the new round alone; of a first round, the whole prompt."""
        if not history:
            return self.build_inputs(tokenizer, query)
        ids = tokenizer.build_round(query, history)
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self.device)

    def _find_end(self, prompt_length: int, num_free: int, max_length, max_new_tokens) -> int:
        """Return the number of ids, prompt and answer together, at which the answer must end.

        Args:
            prompt_length: Number of ids before the answer, including cached ones.
            num_free: How many of these ids `max_length` does not count.

        Raises:
            ValueError: The prompt leaves no room for an answer.
        """
        context = self.config.seq_length
        if max_new_tokens is not None:
            max_length = prompt_length - num_free + max_new_tokens
        end = find_end(prompt_length, context, num_free + max_length)
        if prompt_length >= end:
            kept = f" after {num_free} of the conversation so far" if num_free else ""
            raise ValueError(
                f"The prompt has {prompt_length - num_free} tokens{kept}; max_length is "
                f"{max_length} and the context {context}: shorten the prompt or the history, or "
                "raise max_length."
            )
        return end

    def _chat_settings(
        self,
        tokenizer,
        prompt_length,
        num_free,
        max_length,
        named,
        generation_config=None,
        **kwargs,
    ) -> dict:
        """Return the arguments of `generate` for `chat` and `stream_chat`.

        Args:
            named: `do_sample`, `temperature`, `top_p` and `logits_processor`; `None` if not given.
            kwargs: Further arguments; like `named` they replace the fields of `generation_config`.

        Raises:
            ValueError: There is no room for an answer, or more than one text is requested.
        """
        given = {} if generation_config is None else read_fields(generation_config)
        given["eos_token_id"] = self.find_end_ids(tokenizer, generation_config)
        given |= kwargs | {name: value for name, value in named.items() if value is not None}
        for name, allowed in {"num_return_sequences": 1, "return_dict_in_generate": False}.items():
            if given.get(name, allowed) not in (None, allowed):
                raise ValueError(f"{name}={given[name]}: a chat is one text: use generate.")
        max_length = min(max_length, given.pop("max_length", max_length))
        limits = prompt_length, num_free, max_length, given.pop("max_new_tokens", None)
        settings = read_sampling(self.generation_config, given.get("do_sample")) | given
        settings["do_sample"] = given.get("do_sample", True) and settings["temperature"] > 0
        if not settings["do_sample"]:  # transformers warns of those that have no effect
            settings = {k: v for k, v in settings.items() if k not in SAMPLING_ONLY}
        processors = [*(given.get("logits_processor") or []), InvalidScoreLogitsProcessor()]
        settings |= {
            "tokenizer": tokenizer,
            "max_length": self._find_end(*limits),
            "logits_processor": LogitsProcessorList(processors),
        }
        return own_settings(self.generation_config, **settings)

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str,
        history=None,
        max_length: int = CHAT_DEFAULTS["max_length"],
        num_beams: int = 1,
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: list | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a question.

        By default the checkpoint's generation_config.json decides `do_sample`, `temperature`,
        `top_k`, `top_p`, `min_p` and `repetition_penalty`; `CHAT_DEFAULTS` has what it does not
        name. Its other fields have no effect here.

        Args:
            history: Earlier rounds, a list of (question, answer); it is not changed.
            max_length: Number of tokens of prompt and answer together.
            temperature: 0 for the likeliest token always.
            kwargs: Further arguments of `generate`; `max_new_tokens` replaces `max_length`.

        Returns:
            The answer, and the history with the new round.

        Raises:
            ValueError: The prompt has `max_length` tokens or more, or fills the context, or
                `kwargs` ask for more than one text.
        """
        history = read_history(history)
        input_ids = self.build_inputs(tokenizer, query, history)["input_ids"]
        prompt_length = input_ids.shape[1]
        named = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        named |= {"logits_processor": logits_processor, "num_beams": num_beams}
        settings = self._chat_settings(tokenizer, prompt_length, 0, max_length, named, **kwargs)
        sequences = self.generate(input_ids, past_key_values=ChatGLMCache(), **settings)
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
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: list | None = None,
        return_past_key_values: bool = False,
        prompt: tuple[list[int], int] | None = None,
        **kwargs,
    ):
        """Answer a question token by token: yield (answer so far, history[, cache]).

        Args:
            past_key_values: The cache of an earlier round. If it holds exactly `history`, only the
                new round is computed and counted by `max_length`. Otherwise the longest common
                beginning is kept and the rest of the prompt computed.
            return_past_key_values: Also yield the cache, for the next round.
            prompt: The result of `past_key_values.continue_with` for this question, from a caller
                that has counted its ids; `max_length` then counts them all.

        The other arguments are those of `chat`. Closing the generator ends the generation, and the
        cache then holds the history yielded last. No answer ends with half a character.

        Raises:
            ValueError: As `chat`, or several beams are requested.
        """
        history = read_history(history)
        cache = past_key_values if isinstance(past_key_values, ChatGLMCache) else ChatGLMCache()
        ids, num_kept = prompt or cache.continue_with(tokenizer, query, history)
        num_free = num_kept if prompt is None and cache.stands_for(history) else 0
        named = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        named |= {"logits_processor": logits_processor}
        limits = len(ids), num_free, max_length
        settings = self._chat_settings(tokenizer, *limits, named, **kwargs)
        cache.crop(num_kept - cache.get_seq_length())
        cache.history = None
        input_ids = torch.tensor([ids], device=self.device)
        steps = self.stream_generate(input_ids, past_key_values=cache, **settings)
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
                # `generate` may be ahead of the answer that was yielded last.
                cache.crop(min(len(shown_ids) - 1 - cache.get_seq_length(), 0))
                end_ids = as_ids(settings["eos_token_id"])
                cache.record(shown_ids, [*history, (query, response)], end_ids)
            else:
                cache.reset()

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

        Closing the generator ends the generation within a token. With `return_past_key_values` it
        yields (ids, cache); the thread continues meanwhile, so the cache may be ahead of the ids.
        The other arguments are those of `generate`.

        Raises:
            ValueError: The settings ask for beam search, which cannot be streamed.
        """
        configs = generation_config, self.generation_config
        if (num_beams := read_setting("num_beams", kwargs, *configs) or 1) > 1:
            raise ValueError(f"num_beams={num_beams} cannot be streamed: use 1, chat or generate.")
        cache = pick_cache(past_key_values, cache)
        cache = ChatGLMCache() if cache is None else cache
        streamer, stop, device = TokenStreamer(), threading.Event(), self.device.type
        criteria = [*(stopping_criteria or []), StopOnEvent(stop)]
        is_autocast = torch.is_autocast_enabled(device)  # autocast is set per thread
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), is_autocast)

        def run():
            error = None
            try:
                with autocast:
                    self.generate(
                        input_ids,
                        generation_config,
                        logits_processor,
                        past_key_values=cache,
                        stopping_criteria=StoppingCriteriaList(criteria),
                        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                        streamer=streamer,
                        **kwargs,
                    )
            except BaseException as exception:  # raised again in the reader
                error = exception
            streamer.finish(error)

        thread = threading.Thread(target=run, daemon=True)

        def end():
            stop.set()
            thread.join()

        RUNNING.add(end)
        thread.start()
        try:
            for sequences in streamer:
                yield (sequences, cache) if return_past_key_values else sequences
        finally:
            end()
            RUNNING.discard(end)
