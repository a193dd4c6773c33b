"""The routes /tokenize and /detokenize of openai_api.py, in the form of vLLM."""

from pydantic import BaseModel, model_validator

from .responses import as_json, read_token
from .schema import Ids, Messages, StrictTypes, Text, refused, wrong_together


class TokenizeRequest(StrictTypes):
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    continue_final_message: refused("An answer does not continue a message", False) = None
    chat_template: refused("ChatGLM2 has its own prompt format") = None
    tools: refused("ChatGLM2 is not trained for tools", []) = None

    @model_validator(mode="after")
    def check_together(self):
        if self.prompt is self.messages is None:
            raise wrong_together("prompt", "missing, and so is messages: give one of them")
        if None not in (self.prompt, self.messages):
            raise wrong_together("messages", "not allowed with prompt")
        for param, other in ("add_special_tokens", "prompt"), ("add_generation_prompt", "messages"):
            if getattr(self, param) is not None and getattr(self, other) is None:
                raise wrong_together(param, f"only allowed with {other}")
        return self


class DetokenizeRequest(StrictTypes):
    tokens: Ids


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str


class TokensApi:
    """The handlers. FastAPI calls them in threads, because a long text takes time."""

    def __init__(self, service):
        self.service, self.tokenizer = service, service.tokenizer

    def tokenize(self, body: TokenizeRequest):
        """Return the ids of a text or a conversation, and their number."""
        if body.messages is None:
            is_special = body.add_special_tokens is not False
            ids = self.tokenizer.encode(body.prompt, add_special_tokens=is_special)
        else:
            ids = self.service.encode_chat(body.messages, body.add_generation_prompt is not False)
        texts = [read_token(self.tokenizer, i)[0] for i in ids] if body.return_token_strs else None
        fields = {"count": len(ids), "max_model_len": self.service.batcher.context}
        return as_json(TokenizeResponse(tokens=ids, token_strs=texts, **fields))

    def detokenize(self, body: DetokenizeRequest):
        """Return the text of ids; special tokens have none."""
        (ids,) = self.service.encode_texts(body.tokens, "tokens")
        return as_json(DetokenizeResponse(prompt=self.tokenizer.decode(ids)))
