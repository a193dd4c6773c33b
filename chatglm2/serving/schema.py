"""The fields of requests: types that api.py too builds on, and the requests of openai_api.py.

Fields without effect are not listed: unknown ones are ignored.
"""

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
MAX_MESSAGES = 4096  # of a conversation
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_INPUTS = 2048
MAX_IDS = 2**17  # of a prompt: more than any context
MAX_BIASES = 4096


# Types of fields.


def replace_surrogates(text: str) -> str:
    """Replace halves of characters, which JSON can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_whole(value):
    """Return 1.0 as 1, as JSON Schema has it; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def integer(low: int, high: int | None = None):
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(read_whole)]


Text = Annotated[str, AfterValidator(replace_surrogates)]
Count = integer(1)


class StrictModel(BaseModel):
    """A request or response; unknown fields are ignored."""

    model_config = ConfigDict(strict=True)


def real(low: float, high: float | None = None, convert: Callable[[float], float] = float):
    """Return the type of an optional number within bounds."""
    bounds = Field(ge=low, le=high, allow_inf_nan=False)
    return Annotated[float, bounds, AfterValidator(convert)] | None


def round_temperature(value: float) -> float:
    """Return 0, which is greedy, for what is too small to divide by."""
    return value if value >= MIN_TEMPERATURE else 0.0


# The requests of openai_api.py.


def refused(reason: str, *harmless):
    """Return the type of a field that must not ask for anything."""

    def check(value):
        if not any(type(value) is type(item) and value == item for item in (None, *harmless)):
            raise PydanticCustomError("refused", "{reason}", {"reason": reason})
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *harmless]})]


def wrong_together(param: str, reason: str) -> PydanticCustomError:
    """Return the error of a field that another one excludes."""
    return PydanticCustomError("together", "{reason}", {"reason": reason, "param": param})


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,6}$")]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
Inputs = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)


def find_kind(value) -> str | None:
    """Return the kind of `Texts` by the first item: to try each kind on a long list takes long."""
    if not isinstance(value, list):
        return "a text" if isinstance(value, str) else None
    kinds = {str: "list of texts", int: "list of ids", float: "list of ids", list: "list of lists"}
    return kinds.get(type(value[0])) if value else None


Texts = Annotated[
    Annotated[Text, Tag("a text")]
    | Annotated[list[Text], Inputs, Tag("list of texts")]
    | Annotated[Ids, Tag("list of ids")]
    | Annotated[list[Ids], Inputs, Tag("list of lists")],
    Discriminator(
        find_kind,
        custom_error_type="no_texts",
        custom_error_message="Input should be a text, or a list of texts, ids or lists of ids, "
        "with one item or more",
    ),
]


def check_number(biases):
    """Refuse too many before each is checked."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        message = "Input should have at most {number} items"
        raise PydanticCustomError("too_many", message, {"number": MAX_BIASES})
    return biases


Biases = Annotated[dict[TokenId, Bias], BeforeValidator(check_number)]


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class JsonSchema(StrictModel):
    json_schema: Annotated[dict, Field(alias="schema")]


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing_schema", "json_schema is missing")
        return self

    def read_schema(self) -> dict | None:
        """Return the JSON schema that is asked for."""
        if self.type == "json_schema":
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class SamplingRequest(StrictModel):
    model: Text = "chatglm2-6b"
    temperature: real(0, 2, round_temperature) = None
    top_p: real(0, 1) = None
    top_k: integer(0) | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_length: Count | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: integer(-(2**63), 2**63 - 1) | None = None
    n: integer(1, MAX_CHOICES) | None = None
    presence_penalty: real(-2, 2) = None
    frequency_penalty: real(-2, 2) = None
    repetition_penalty: real(0.01, 10) = None
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def check_together(self):
        is_json = self.response_format is not None and self.response_format.type != "text"
        if self.ignore_eos and is_json:
            raise wrong_together("ignore_eos", "JSON ends, so response_format excludes it")
        if self.stream_options is not None and not self.stream:
            raise wrong_together("stream_options", "only allowed with stream: true")
        return self


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts | None = None
    tool_calls: refused("ChatGLM2 is not trained for tools", []) = None
    function_call: refused("ChatGLM2 is not trained for functions") = None


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: integer(0, MAX_LOGPROBS) | None = None
    tools: refused("ChatGLM2 is not trained for tools", []) = None
    tool_choice: refused("ChatGLM2 is not trained for tools", "none", "auto") = None
    functions: refused("ChatGLM2 is not trained for functions", []) = None
    function_call: refused("ChatGLM2 is not trained for functions", "none", "auto") = None
    modalities: refused("ChatGLM2 answers with text only", [], ["text"]) = None
    audio: refused("ChatGLM2 answers with text only") = None
    web_search_options: refused("There is no web search") = None

    @model_validator(mode="after")
    def check_logprobs(self):
        if self.top_logprobs and self.logprobs is False:
            raise wrong_together("top_logprobs", "only allowed with logprobs: true")
        return self


class CompletionRequest(SamplingRequest):
    prompt: Texts
    logprobs: integer(0, MAX_LOGPROBS) | None = None
    echo: refused("The prompt is not sent back", False) = None
    suffix: refused("ChatGLM2 writes onwards only", "") = None
    best_of: refused("All answers are sent: use n", 1) = None


class EmbeddingRequest(StrictModel):
    input: Texts
    model: Text = "chatglm2-6b"
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: refused("The number of dimensions is the model's") = None
