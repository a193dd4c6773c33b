"""A conversation with its kept cache, within a number of tokens: for the terminal and the pages."""

from contextlib import closing

from chatglm2 import CHAT_DEFAULTS, ChatGLMCache

MAX_ANSWER_ROOM = 512  # tokens kept free for an answer; a quarter of the limit if that is less


class Conversation:
    """Rounds and cache of one chat.

    Attributes:
        rounds: All rounds, a list of (question, answer).
        first_round: Index of the first round that the model still sees; the older ones were
            dropped.
        num_dropped: Number of rounds that the last question dropped.
    """

    DROPPED = (
        "对话过长，已忘记最早的 {0} 轮 / too long a conversation: the oldest {0} rounds are dropped"
    )
    STOPPED = "已停止，对话保留 / stopped, the conversation is kept"

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.clear()

    def clear(self):
        self.rounds, self.first_round, self.num_dropped = [], 0, 0
        self.free_cache()

    def free_cache(self):
        """Release the memory of the cache; the next answer computes its whole prompt."""
        self.cache = ChatGLMCache()

    @property
    def history(self) -> list[tuple[str, str]]:
        """The rounds that the model sees."""
        return self.rounds[self.first_round :]

    @property
    def was_cut(self) -> bool:
        """True if the last answer reached the length limit: its last id is no end of an answer."""
        return bool(self.cache.pending_ids)

    def pop(self) -> str:
        """Remove the last round and return its question; "" if there is none."""
        query, _ = self.rounds.pop() if self.rounds else ("", "")
        if self.first_round >= len(self.rounds):
            self.first_round = 0
        return query

    def stream(self, query: str, max_length: int = CHAT_DEFAULTS["max_length"], **sampling):
        """Answer a question; the oldest rounds are dropped if they leave too little room for that.

        Args:
            max_length: Number of tokens of the conversation, bounded by the model's context.
            sampling: Further arguments of `stream_chat`.

        Returns:
            A generator of the answer so far. Rounds and cache grow with it; closing it ends the
            generation within a token.

        Raises:
            ValueError: The question alone is too long; the conversation is unchanged.
        """
        max_length = min(max_length, self.model.config.seq_length)
        prompt = self.fit(query, compute_limit(max_length))
        answers = self.model.stream_chat(
            self.tokenizer,
            query,
            self.history,
            past_key_values=self.cache,
            return_past_key_values=True,
            max_length=max_length,
            prompt=prompt,
            **sampling,
        )
        return self.follow(answers)

    def follow(self, answers):
        with closing(answers):
            for answer, history, self.cache in answers:
                self.rounds[self.first_round :] = history
                yield answer

    def fit(self, query: str, limit: int) -> tuple[list[int], int]:
        """Return the prompt, as `continue_with`; drop the oldest rounds beyond `limit` ids."""
        prompt = self.cache.continue_with(self.tokenizer, query, self.history)
        if len(prompt[0]) <= limit:
            self.num_dropped = 0
            return prompt
        # A generated answer may have more ids than its text needs: count those of the texts.
        cache = ChatGLMCache()
        ids, history = drop_oldest(
            lambda history: cache.continue_with(self.tokenizer, query, history)[0],
            self.history,
            limit,
        )
        self.num_dropped = len(self.history) - len(history)
        self.first_round += self.num_dropped
        self.cache = cache
        return ids, 0


def compute_limit(max_length: int) -> int:
    """Return how many tokens a prompt may have, so that there is room for an answer."""
    return max_length - min(max_length // 4, MAX_ANSWER_ROOM)


def drop_oldest(encode, rounds: list, limit: int) -> tuple[list[int], list]:
    """Return a prompt of at most `limit` ids, and the rounds in it; drop the oldest if necessary.

    Then the prompt is cut to three quarters of `limit`: all of it has to be computed anew, and some
    rounds should be able to continue with its cache.

    Args:
        encode: Returns the ids of the prompt with these rounds.

    Raises:
        ValueError: The question alone is too long.
    """
    ids = encode(rounds)
    target = limit if len(ids) <= limit else limit * 3 // 4
    while rounds and len(ids) > target:
        rounds = rounds[1:]
        ids = encode(rounds)
    if len(ids) > limit:
        raise ValueError(
            f"问题有 {len(ids)} 个 token，最多 {limit} 个，请缩短。"
            f"The question has {len(ids)} tokens, at most {limit} fit: shorten it."
        )
    return ids, rounds
