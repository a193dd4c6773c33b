"""How answers are sampled: whose settings count, which ids exist, where an answer ends.

This file is also Hugging Face remote code.
"""

import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Sampling of chat, stream_chat and every script; generate alone is greedy, as the original.
CHAT_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.8,
    "max_length": 8192,
}

# `generate` uses every field of a checkpoint's generation_config; chat, stream_chat and the scripts
# only these, which decide how likely tokens are, and the special ids.
SAMPLING_ONLY = {"temperature", "top_k", "top_p", "min_p"}
CHECKPOINT_FIELDS = {"do_sample", "repetition_penalty"} | SAMPLING_ONLY
SPECIAL_IDS = {"eos_token_id", "pad_token_id", "bos_token_id"}
# Values of the fields for which `generate` does not accept `None`.
PLAIN_FIELDS = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": 0,
}

# Defaults of transformers.
PLAIN_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
# If `generate` has no other fields than these, `SamplingLogitsProcessor` samples.
SAMPLER_FIELDS = CHECKPOINT_FIELDS | SPECIAL_IDS | {"max_length", "max_new_tokens"}

NUM_SORTED = 4096  # likeliest ids that are sorted for `top_p`; all are if these are too few


def read_fields(generation_config: GenerationConfig) -> dict:
    """Return the fields that are set."""
    fields = vars(generation_config).items()
    hidden = {"transformers_version"}
    return {k: v for k, v in fields if v is not None and not k.startswith("_") and k not in hidden}


def own_settings(generation_config: GenerationConfig, **settings) -> dict:
    """Return arguments of `generate` that leave to a checkpoint only what it may decide.

    Args:
        generation_config: The checkpoint's. Its fields outside of `CHECKPOINT_FIELDS` are reset.
        settings: The arguments to add.
    """
    used = CHECKPOINT_FIELDS | SPECIAL_IDS | settings.keys()
    others = {k: v for k, v in read_fields(generation_config).items() if k not in used}
    unused = sorted(k for k, v in others.items() if v is not False and v != PLAIN_FIELDS.get(k))
    if unused:
        logger.warning_once(
            f"chat and the scripts do not use the checkpoint's {', '.join(unused)}: give them as "
            "arguments, or use generate."
        )
    return {name: PLAIN_FIELDS.get(name) for name in others} | settings


def read_sampling(generation_config: GenerationConfig, do_sample: bool | None = None) -> dict:
    """Return the fields of `SAMPLING_ONLY` and repetition_penalty.

    What the checkpoint does not name is that of `CHAT_DEFAULTS`, or has no effect.

    Args:
        generation_config: The checkpoint's.
        do_sample: Replaces the checkpoint's. If it is False, the temperature is 0.
    """
    sampling = {k: CHAT_DEFAULTS.get(k) for k in SAMPLING_ONLY} | {"repetition_penalty": 1.0}
    fields = read_fields(generation_config)
    sampling |= {name: fields[name] for name in sampling.keys() & fields.keys()}
    if do_sample is None:
        do_sample = fields.get("do_sample", CHAT_DEFAULTS["do_sample"])
    return sampling if do_sample else sampling | {"temperature": 0.0}


def as_ids(ids) -> list[int]:
    """Return one id, several ids or `None` as a list."""
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def find_end_ids(*sources, num_ids: int) -> list[int]:
    """Return the ids that end an answer, from the first source that names one below `num_ids`.

    Args:
        sources: Objects with `eos_token_id`; `None` is skipped.
    """
    for source in sources:
        ids = as_ids(getattr(source, "eos_token_id", None))
        if ids := [i for i in ids if isinstance(i, int) and 0 <= i < num_ids]:
            return ids
    return []


def find_end(prompt_length: int, context: int, max_length=None, max_new_tokens=None) -> int:
    """Return the number of tokens, prompt and answer together, at which an answer must end.

    The lowest limit counts; `None` is no limit. The result is at most `prompt_length` if there is
    no room for an answer.
    """
    limits = [context, max_length]
    if max_new_tokens is not None:
        limits.append(prompt_length + max_new_tokens)
    return min(limit for limit in limits if limit is not None)


class VocabularyLogitsProcessor(LogitsProcessor):
    """Bans the ids from `num_ids` on: rows that pad the output matrix and are no tokens."""

    def __init__(self, num_ids: int):
        self.num_ids = num_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        num_banned = scores.shape[-1] - self.num_ids
        if num_banned <= 0:
            return scores
        return F.pad(scores[..., : self.num_ids], (0, num_banned), value=-torch.inf)


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Force id 5 in a broken row of scores, as the original, so that sampling does not fail.

    A row is broken if it has NaN or +inf, or no finite score; -inf is a banned token.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        is_whole = scores.amax(-1, keepdim=True).isfinite()  # the maximum with NaN is NaN
        if is_whole.all():
            return scores
        logger.warning_once(
            "The model computed NaN or infinity, or all tokens are banned: broken or incomplete "
            "weights, an overflow of float16 (try float32 or bfloat16), or settings that allow "
            "nothing."
        )
        forced = torch.zeros_like(scores)
        forced[..., 5] = 5e4
        return torch.where(is_whole, scores, forced)


class LikeliestTopPLogitsWarper(TopPLogitsWarper):
    """Sorts only the likeliest ids, if they have the probability `top_p` together."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.shape[-1] <= NUM_SORTED:
            return super().__call__(input_ids, scores)
        top, ids = scores.softmax(-1).topk(NUM_SORTED)
        before = top.cumsum(-1) - top  # probability of likelier ids
        if (before[:, -1] < self.top_p).any():
            return super().__call__(input_ids, scores)
        is_dropped = (before > 0) & (before >= self.top_p)
        kept = scores.gather(1, ids).masked_fill(is_dropped, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, ids, kept)


class SamplingLogitsProcessor(LogitsProcessor):
    """Samples the next id and bans all others, so that greedy `generate` returns it.

    transformers itself sorts all scores for `top_p` and draws a random number for each id. Here
    this is done for the `top_k` candidates alone. There are exactly `top_k`, even if other ids have
    the same score as the last one.

    The arguments are those of `generate`; `None` has no effect.
    """

    def __init__(self, temperature=None, top_k=None, top_p=None, min_p=None):
        self.top_k = TopKLogitsWarper(top_k).top_k if top_k else None
        self.warpers = []
        if temperature not in (None, 1):
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_p is not None and top_p < 1:
            self.warpers.append(LikeliestTopPLogitsWarper(top_p))
        if min_p:
            self.warpers.append(MinPLogitsWarper(min_p))

    def find_candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates' ids and probabilities, both [b, k]; scores are [b, V].

        They are ordered by id, because rounding can swap two scores, and with them the random
        numbers of their ids.
        """
        num_ids = scores.shape[1]
        if self.top_k is None or self.top_k >= num_ids:
            ids = torch.arange(num_ids, device=scores.device).expand_as(scores)
        else:
            ids = scores.topk(self.top_k).indices.sort(-1).values
            scores = scores.gather(1, ids)
        for warper in self.warpers:
            scores = warper(None, scores)
        return ids, scores.softmax(-1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids, probabilities = self.find_candidates(scores)
        sampled = ids.gather(1, torch.multinomial(probabilities, 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, sampled, 0.0)


def create_sampler(fields: dict) -> SamplingLogitsProcessor | None:
    """Return the sampler for a call of `generate`.

    It is `None` if the call is greedy, or if it has a field that could act after the sampler or
    read its scores; then transformers does it all.

    Args:
        fields: The fields of generation_config and the arguments that replace them.
    """
    known = vars(GenerationConfig()).keys() | {"assistant_model", "custom_generate"}
    others = (known & fields.keys()) - SAMPLER_FIELDS
    is_unusual = any(fields[k] not in (None, False, PLAIN_FIELDS.get(k)) for k in others)
    if is_unusual or not fields.get("do_sample"):
        return None
    return SamplingLogitsProcessor(**{k: fields.get(k, v) for k, v in PLAIN_SAMPLING.items()})
