"""The fields of requests: their types, which api.py uses too, and the requests of openai_api.py.

A field that `batching.Request` has too is passed on by its name. The others are read in
openai_api.py, or are `refused` here. Unknown fields are ignored.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MIN_TEMPERATURE = 1e-4
MAX_MESSAGES = 4096  # in a conversation
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_INPUTS = 2048
MAX_IDS = 2**17  # in a prompt: more than any context
MAX_BIASES = 4096
MAX_TOOLS = 128
MAX_DIMENSIONS = 2**20


# Types of fields.


def replace_surrogates(text: str) -> str:
    """Replace half characters, which JSON can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_whole(value):
    """Return 1.0 as 1, because JSON Schema counts it as an integer; other values unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value


def read_whole_ids(value):
    """Return a list of ids with 1.0 as 1; one pass for the list, because a call per id is slow."""
    if isinstance(value, list) and len(value) <= MAX_IDS and float in set(map(type, value)):
        return [*map(read_whole, value)]
    return value


def integer(low: int, high: int | None = None):
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(read_whole)]


Text = Annotated[str, AfterValidator(replace_surrogates)]
Count = integer(1)


class StrictTypes(BaseModel):
    """A request, or a part of one. No type is converted: "1" is not accepted as a number."""

    model_config = ConfigDict(strict=True)


def real(low: float, high: float | None = None, convert: Callable[[float], float] = float):
    """Return the type of an optional number within bounds."""
    bounds = Field(ge=low, le=high, allow_inf_nan=False)
    return Annotated[float, bounds, AfterValidator(convert)] | None


def round_temperature(value: float) -> float:
    """Return 0, which is greedy, for a temperature that is too small to divide by."""
    return value if value >= MIN_TEMPERATURE else 0.0


# The requests of openai_api.py.


def refused(reason: str, *harmless):
    """Return the type of an unsupported field, which accepts only `None` and `harmless` values."""

    allowed = ", ".join(json.dumps(item) for item in (None, *harmless))
    context = {"reason": reason, "allowed": allowed}

    def check(value):
        if not any(type(value) is type(item) and value == item for item in (None, *harmless)):
            raise PydanticCustomError("refused", "{reason}; allowed: {allowed}", context)
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *harmless]})]


def wrong_together(param: str, reason: str) -> PydanticCustomError:
    """Return the error for a field that another field excludes."""
    return PydanticCustomError("together", "{reason}", {"reason": reason, "param": param})


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,6}$")]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[
    list[Id],
    Field(min_length=1, max_length=MAX_IDS, fail_fast=True),
    BeforeValidator(read_whole_ids),
]
Inputs = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)


def find_kind(value) -> str | None:
    """Return the tag of `Texts` by the first item; to try each type on a long list is slow."""
    if not isinstance(value, list):
        return "a text" if isinstance(value, str) else None
    kinds = {str: "list of texts", int: "list of ids", float: "list of ids", list: "list of lists"}
    return kinds.get(type(value[0])) if value else None


def as_list(value):
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)],
    AfterValidator(as_list),
]
Texts = Annotated[
    Annotated[Text, Tag("a text")]
    | Annotated[list[Text], Inputs, Tag("list of texts")]
    | Annotated[Ids, Tag("list of ids")]
    | Annotated[list[Ids], Inputs, Tag("list of lists")],
    Discriminator(
        find_kind,
        custom_error_type="no_texts",
        custom_error_message="expected a text, or a list of texts, ids or lists of ids, "
        "with one item or more",
    ),
]


def check_number(biases):
    """Refuse too many biases before each is checked."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        message = "expected at most {number} items"
        raise PydanticCustomError("too_many", message, {"number": MAX_BIASES})
    return biases


Biases = Annotated[dict[TokenId, Bias], BeforeValidator(check_number)]


class StreamOptions(StrictTypes):
    include_usage: bool | None = None


class JsonSchema(StrictTypes):
    content: Annotated[dict, Field(alias="schema")]


class ResponseFormat(StrictTypes):
    """OpenAI's forms, and llama.cpp's, which has the schema in a field `schema` beside `type`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    content: Annotated[dict | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def check_schema(self):
        num_schemas = (self.json_schema is not None) + (self.content is not None)
        if self.type == "json_schema" and not num_schemas:
            raise PydanticCustomError("missing_schema", "the schema is missing")
        if num_schemas > (self.type != "text"):
            message = "expected one schema, and only with a type for JSON"
            raise PydanticCustomError("schemas", message)
        return self

    def read_schema(self) -> dict | None:
        """Return the requested JSON schema; `None` for text."""
        if self.json_schema is not None:
            return self.json_schema.content
        if self.content is not None:
            return self.content
        return {"type": "object"} if self.type == "json_object" else None


USE_RESPONSE_FORMAT = "Use response_format with a JSON schema"  # instead of fields of vLLM


class SamplingRequest(StrictTypes):
    model: Text = "chatglm2-6b"
    temperature: real(0, 2, round_temperature) = None
    top_p: real(0, 1) = None
    top_k: integer(0) | None = None
    min_p: real(0, 1) = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_length: Count | None = None
    stop: Stops | None = None
    seed: integer(-(2**63), 2**63 - 1) | None = None
    n: integer(1, MAX_CHOICES) | None = None
    presence_penalty: real(-2, 2) = None
    frequency_penalty: real(-2, 2) = None
    repetition_penalty: real(0.01, 10) = None
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    guided_json: refused(USE_RESPONSE_FORMAT) = None
    guided_choice: refused(USE_RESPONSE_FORMAT) = None
    guided_regex: refused(USE_RESPONSE_FORMAT) = None
    guided_grammar: refused(USE_RESPONSE_FORMAT) = None
    structured_outputs: refused(USE_RESPONSE_FORMAT) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def check_together(self):
        is_json = self.response_format is not None and self.response_format.type != "text"
        if self.ignore_eos and is_json:
            raise wrong_together(
                "ignore_eos", "not allowed with an answer in JSON, which ends by itself"
            )
        if self.stream_options is not None and not self.stream:
            raise wrong_together("stream_options", "only allowed with stream: true")
        return self


class TextPart(StrictTypes):
    type: Literal["text"]
    text: Text


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class Message(StrictTypes):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts | None
    tool_calls: refused("ChatGLM2 is not trained for tools", []) = None
    function_call: refused("ChatGLM2 is not trained for functions") = None

    @model_validator(mode="after")
    def check_content(self):
        if self.content is None and self.role != "assistant":  # as OpenAI
            raise PydanticCustomError("no_content", "content may only be null for an assistant")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Tools = Annotated[list[dict], Field(max_length=MAX_TOOLS, fail_fast=True)]


class ChatRequest(SamplingRequest):
    messages: Messages
    logprobs: bool | None = None
    top_logprobs: integer(0, MAX_LOGPROBS) | None = None
    tools: Tools | None = None
    tool_choice: refused("ChatGLM2 is not trained for tools", "none", "auto") = None
    functions: Tools | None = None
    function_call: refused("ChatGLM2 is not trained for functions", "none", "auto") = None
    modalities: refused("ChatGLM2 answers with text only", [], ["text"]) = None
    audio: refused("ChatGLM2 answers with text only") = None
    prediction: refused("There are no predicted outputs") = None
    reasoning_effort: refused("ChatGLM2 does not reason before it answers", "none") = None
    verbosity: refused("The length of answers cannot be chosen", "medium") = None
    moderation: refused("There is no moderation") = None
    web_search_options: refused("There is no web search") = None
    store: refused("Answers are not stored", False) = None
    service_tier: refused("There is one tier", "auto", "default") = None

    @model_validator(mode="after")
    def check_tools(self):
        for param, choice in ("tools", "tool_choice"), ("functions", "function_call"):
            if getattr(self, param) and getattr(self, choice) != "none":
                reason = f'ChatGLM2 is not trained for tools: allowed with "{choice}": "none"'
                raise wrong_together(param, reason)
        return self

    @model_validator(mode="after")
    def check_logprobs(self):
        if self.top_logprobs and self.logprobs is False:
            raise wrong_together("top_logprobs", "only allowed with logprobs: true")
        return self


class CompletionRequest(SamplingRequest):
    prompt: Texts
    max_tokens: integer(0) | None = None
    logprobs: integer(0, MAX_LOGPROBS) | None = None
    echo: bool | None = None
    suffix: refused("ChatGLM2 cannot insert text before a suffix", "") = None
    best_of: refused("All answers are returned: use n", 1) = None


class EmbeddingRequest(StrictTypes):
    input: Texts
    model: Text = "chatglm2-6b"
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: integer(1, MAX_DIMENSIONS) | None = None
