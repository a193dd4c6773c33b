"""A conversation with its kept cache, within a number of tokens: for the terminal and the pages."""

from contextlib import closing

from chatglm2 import ChatGLMCache

MAX_ANSWER_ROOM = 512  # tokens kept free for an answer; a quarter of the limit if that is less
DROPPED = (
    "对话过长，已忘记最早的 {0} 轮 / too long a conversation: the oldest {0} rounds are dropped"
)
STOPPED = "已停止，对话保留 / stopped, the conversation is kept"


def count_prompt(tokenizer, query: str, history) -> int:
    return len(tokenizer.encode(tokenizer.build_prompt(query, history)))


def fit_history(tokenizer, query: str, history: list, limit: int) -> list:
    """Return `history` if its prompt has at most `limit` ids, else without its oldest rounds.

    Then it is cut to three quarters of `limit`, so that the prompt, which has to be computed anew,
    can be continued for some rounds with a kept cache.

    Raises:
        ValueError: The question alone is longer than `limit`.
    """
    if (length := count_prompt(tokenizer, query, [])) > limit:
        raise ValueError(
            f"问题有 {length} 个 token，最多 {limit} 个，请缩短。"
            f"The question has {length} tokens, at most {limit} fit: shorten it."
        )
    if count_prompt(tokenizer, query, history) <= limit:
        return history
    while history and count_prompt(tokenizer, query, history) > limit * 3 // 4:
        history = history[1:]
    return history


class Conversation:
    """Rounds and cache of one chat.

    Attributes:
        rounds: All rounds, a list of (question, answer).
        first_round: Index of the first one that the model still sees; there was no room for more.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.clear()

    def clear(self):
        self.rounds, self.first_round = [], 0
        self.free_cache()

    def free_cache(self):
        """Give the memory back; the next answer computes its whole prompt."""
        self.cache = ChatGLMCache()

    @property
    def history(self) -> list[tuple[str, str]]:
        """The rounds that the model sees."""
        return self.rounds[self.first_round :]

    def pop(self) -> str:
        """Take the last round back and return its question; "" if there is none."""
        query, _ = self.rounds.pop() if self.rounds else ("", "")
        if self.first_round >= len(self.rounds):
            self.first_round = 0
        return query

    def make_room(self, query: str, max_length: int) -> tuple[int, int]:
        """Drop the oldest rounds if they leave too little room for an answer.

        Returns:
            The room within `max_length` tokens, and how many rounds were dropped now.

        Raises:
            ValueError: The question alone is too long; the conversation is unchanged.
        """
        limit = min(max_length, self.model.config.seq_length)
        prompt_limit = limit - min(limit // 4, MAX_ANSWER_ROOM)
        ids, _ = self.cache.continue_with(self.tokenizer, query, self.history)
        dropped = 0
        if len(ids) > prompt_limit:
            history = fit_history(self.tokenizer, query, self.history, prompt_limit)
            dropped = len(self.history) - len(history)
            self.first_round += dropped
            # A new cache even if none is dropped: an answer may be spelt with more ids than needed.
            self.free_cache()
            ids, _ = self.cache.continue_with(self.tokenizer, query, history)
        return limit - len(ids), dropped

    def stream(self, query: str, room: int, **sampling):
        """Yield the answer as it grows, up to `room` tokens; rounds and cache grow with it.

        Closing the generator ends the generation within a token.
        """
        answers = self.model.stream_chat(
            self.tokenizer,
            query,
            self.history,
            past_key_values=self.cache,
            return_past_key_values=True,
            max_new_tokens=room,
            **sampling,
        )
        with closing(answers):
            for answer, history, self.cache in answers:
                self.rounds[self.first_round :] = history
                yield answer

    @property
    def was_cut(self) -> bool:
        """Whether the last answer ended for want of room: its last id is no end of an answer."""
        return bool(self.cache.pending_ids)
