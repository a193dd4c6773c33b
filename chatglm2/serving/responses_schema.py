"""The shapes of /v1/responses: the fields of a request, and the response object.

Fields of a request that the other routes have too behave as there, see `schema.py`.
"""

from typing import Annotated, Literal

from openai.types.responses import ResponseError, ResponseUsage
from openai.types.responses.response import IncompleteDetails
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from . import schema
from .schema import MAX_LOGPROBS, MAX_MESSAGES, Count, StrictTypes, Text, integer, refused

MAX_METADATA = 16
MAX_INCLUDED = 32
LOGPROBS = "message.output_text.logprobs"  # a value of `include`


# A request.


class TextPart(StrictTypes):
    type: Literal["input_text", "output_text"]
    text: Text


Parts = Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class InputMessage(StrictTypes):
    """A message of a client, or an item of an earlier output."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts

    def read_text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ItemReference(StrictTypes):
    """The id of an item in the output of a stored response, instead of the item."""

    type: Literal["item_reference"]
    id: Text


def find_kind(item) -> str:
    is_reference = isinstance(item, dict) and item.get("type") == "item_reference"
    return "a reference" if is_reference else "a message"


Item = Annotated[
    Annotated[InputMessage, Tag("a message")] | Annotated[ItemReference, Tag("a reference")],
    Discriminator(find_kind),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TextFormat(schema.ResponseFormat):
    """As `response_format` of the other routes, with the schema in the field `schema`."""

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None


class TextConfig(StrictTypes):
    format: TextFormat | None = None
    verbosity: refused("The length of answers cannot be chosen", "medium") = None


class Reasoning(StrictTypes):
    effort: refused("ChatGLM2 does not reason before it answers", "none") = None
    summary: refused("ChatGLM2 does not reason before it answers", "auto") = None


class StreamOptions(StrictTypes):
    include_obfuscation: refused("Events are not padded", False) = None


USE_TEXT_FORMAT = "Use text.format with a JSON schema"
MetadataKey = Annotated[Text, Field(max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]


class ResponsesRequest(schema.SamplingRequest):
    input: Text | Items
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool | None = None
    max_output_tokens: Count | None = None
    text: TextConfig | None = None
    top_logprobs: integer(0, MAX_LOGPROBS) | None = None
    include: Annotated[list[Text], Field(max_length=MAX_INCLUDED)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] | None = (
        None
    )
    stream_options: StreamOptions | None = None
    tools: schema.Tools | None = None
    tool_choice: refused("ChatGLM2 is not trained for tools", "none", "auto") = None
    reasoning: Reasoning | None = None
    background: refused("Answers are not computed in the background", False) = None
    conversation: refused("Use previous_response_id") = None
    prompt: refused("There are no prompt templates") = None
    truncation: Literal["auto", "disabled"] | None = None
    context_management: refused("Use truncation", []) = None
    moderation: refused("There is no moderation") = None
    service_tier: refused("There is one tier", "auto", "default") = None
    n: refused("There is one answer", 1) = None
    max_tokens: refused("Use max_output_tokens") = None
    max_completion_tokens: refused("Use max_output_tokens") = None
    response_format: refused("Use text.format") = None
    guided_json: refused(USE_TEXT_FORMAT) = None
    guided_choice: refused(USE_TEXT_FORMAT) = None
    guided_regex: refused(USE_TEXT_FORMAT) = None
    guided_grammar: refused(USE_TEXT_FORMAT) = None
    structured_outputs: refused(USE_TEXT_FORMAT) = None

    @model_validator(mode="after")
    def check_together(self):
        if self.tools and self.tool_choice != "none":
            reason = 'ChatGLM2 is not trained for tools: allowed with "tool_choice": "none"'
            raise schema.wrong_together("tools", reason)
        # The names of these fields on the other routes.
        self.max_tokens, self.response_format = self.max_output_tokens, self.read_format()
        return super().check_together()

    def read_format(self) -> TextFormat | None:
        return self.text and self.text.format

    def count_logprobs(self) -> int | None:
        """Return how many likeliest tokens to report; `None` for no log-probabilities at all."""
        is_wanted = self.top_logprobs or LOGPROBS in (self.include or [])
        return self.top_logprobs or 0 if is_wanted else None


# A response.


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[dict] = []
    logprobs: list[dict] = []


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    content: list[OutputText] = []


class ResponseObject(BaseModel):
    """A response; fields that a request has too have its values."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputMessage] = []
    usage: ResponseUsage | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, str] = {}
    max_output_tokens: int | None = None
    text: dict
    temperature: float
    top_p: float
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    tools: list[dict] = []
    tool_choice: Literal["none", "auto"] = "auto"
    reasoning: dict = {"effort": None, "summary": None}
    truncation: Literal["auto", "disabled"] = "disabled"
    # Fields of OpenAI's with only this value here.
    background: Literal[False] = False
    max_tool_calls: None = None
    parallel_tool_calls: Literal[True] = True
    prompt_cache_key: None = None
    safety_identifier: None = None
    service_tier: Literal["default"] = "default"
    user: None = None


class InputItem(BaseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["system", "developer", "user"]
    status: Literal["completed"] = "completed"
    content: list[TextPart]


class InputItems(BaseModel):
    """A page of the messages before an answer; the ids are `None` if it is empty."""

    object: Literal["list"] = "list"
    data: list[InputItem | OutputMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
