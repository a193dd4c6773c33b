"""Serve ChatGLM2 as OpenAI's API: chat, completions, embeddings.

    python openai_api.py --model resources/chatglm2-tiny

Clients set their base URL to http://127.0.0.1:8000/v1, and any key.
"""

import argparse
import time
import uuid
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import utils
from chatglm2.serving import responses, schema, server
from chatglm2.serving.batching import Generation, OccurrencePenalty, Request
from chatglm2.serving.json_grammar import JsonGrammar
from chatglm2.serving.server import RequestError

COMPLETION_MAX_TOKENS = 16  # OpenAI's default


def usage_of(generations: list[Generation], num_tokens: int, num_choices=1) -> CompletionUsage:
    """Count tokens; a prompt of several answers counts once."""
    prompts = generations[::num_choices]
    prompt_tokens = sum(generation.prompt_length for generation in prompts)
    cached_tokens = sum(generation.num_cached for generation in prompts)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=prompt_tokens + num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


class Service:
    """The handlers of all routes, for one model."""

    def __init__(self, model, tokenizer, name: str, batcher, metrics):
        self.model, self.tokenizer, self.batcher, self.metrics = model, tokenizer, batcher, metrics
        self.card = Model(id=name, created=int(time.time()), object="model", owned_by="THUDM")

    @cached_property
    def grammar(self) -> JsonGrammar:
        return JsonGrammar(self.tokenizer, self.model.config.padded_vocab_size)

    def encode_chat(self, messages: list[schema.Message]) -> list[int]:
        messages = [message.model_dump(include={"role", "content"}) for message in messages]
        for message in messages:
            message["role"] = message["role"].replace("developer", "system")
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def encode_texts(self, texts: schema.Texts, param: str) -> list[list[int]]:
        """Return the ids of one text or several; given ids are taken as they are."""
        several = texts if isinstance(texts, list) and not isinstance(texts[0], int) else [texts]
        prompts = [self.tokenizer.encode(t) if isinstance(t, str) else t for t in several]
        for ids in prompts:
            if max(ids) >= (size := self.tokenizer.vocab_size):
                raise RequestError(400, f"{param}: id {max(ids)} is not below {size}.", param)
        return prompts

    def build_processors(
        self, body: schema.SamplingRequest, prompt_length: int
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if body.repetition_penalty is not None:
            processors.append(RepetitionPenaltyLogitsProcessor(body.repetition_penalty))
        presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
        if presence or frequency:
            processors.append(OccurrencePenalty(presence, frequency, prompt_length))
        if body.logit_bias:
            biases = {(int(token_id),): bias for token_id, bias in body.logit_bias.items()}
            if max(biases) >= (self.tokenizer.vocab_size,):
                message = f"logit_bias: the ids are below {self.tokenizer.vocab_size}."
                raise RequestError(400, message, "logit_bias")
            processors.append(SequenceBiasLogitsProcessor(biases))
        json_schema = body.response_format and body.response_format.read_schema()
        if json_schema is not None:  # {} is a schema too: any JSON
            try:
                processors.append(self.grammar.compile(json_schema, prompt_length))
            except ValueError as error:
                message = f"response_format: {error}"
                raise RequestError(400, message, "response_format") from error
        return processors

    def build_request(self, body: schema.SamplingRequest, ids: list[int], choice: int, **settings):
        limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit]
        if body.max_length:
            limits.append(server.count_room(len(ids), body.max_length))
        names = {"temperature", "top_p", "top_k", "ignore_eos"}
        return Request(
            ids,
            min(limits, default=None),
            seed=None if body.seed is None else body.seed + choice,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            processors=self.build_processors(body, len(ids)),
            **body.model_dump(include=names, exclude_none=True),
            **settings,
        )

    def build_chat(self, body: schema.ChatRequest) -> list[Request]:
        num_logprobs = body.top_logprobs if body.logprobs is None else body.top_logprobs or 0
        settings = {
            "num_logprobs": None if body.logprobs is False else num_logprobs,
            "process_text": self.model.process_response,
        }
        ids = self.encode_chat(body.messages)
        return [self.build_request(body, ids, i, **settings) for i in range(body.n or 1)]

    def build_completions(self, body: schema.CompletionRequest) -> list[Request]:
        if not (body.max_tokens or body.max_completion_tokens or body.max_length):
            body.max_tokens = COMPLETION_MAX_TOKENS
        return [
            self.build_request(body, ids, i, num_logprobs=body.logprobs)
            for ids in self.encode_texts(body.prompt, "prompt")
            for i in range(body.n or 1)
        ]

    async def answer(
        self, form: responses.Completions, body, http_request, requests: list[Request]
    ):
        generations = server.submit_all(self.batcher, requests, form.param, body.n or 1)
        envelope = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        if body.stream:
            return server.EventStream(self.events(form, envelope, body, generations), generations)
        answers = await server.collect(http_request, generations, self.metrics)
        choices = [form.whole(index, answer) for index, answer in enumerate(answers)]
        num_tokens = sum(len(answer.token_ids) for answer in answers)
        usage = usage_of(generations, num_tokens, body.n or 1)
        return as_json(form.whole_type(**envelope, object=form.name, choices=choices, usage=usage))

    async def events(self, form: responses.Completions, envelope: dict, body, generations):
        def event(choices: list, **fields) -> str:
            chunk = form.chunk_type(**envelope, object=form.chunk_name, choices=choices, **fields)
            return server.event(chunk.model_dump_json(exclude_unset=True))

        for index in range(len(generations)):
            for choice in form.begin(index):
                yield event([choice])
        num_tokens = 0
        try:
            async for index, chunk in server.follow(generations, self.metrics):
                num_tokens += len(chunk.token_ids)
                if chunk.text or chunk.logprobs:
                    yield event([form.piece(index, chunk)])
                if chunk.finish_reason:
                    yield event([form.end(index, chunk.finish_reason)])
        except Exception as error:  # the status 200 is sent: an event has to tell
            yield server.error_event(error)
            return
        if body.stream_options and body.stream_options.include_usage:
            yield event([], usage=usage_of(generations, num_tokens, body.n or 1))
        yield server.event("[DONE]")

    async def chat(self, body: schema.ChatRequest, request: HTTPRequest):
        """Answer a conversation."""
        requests = await run_in_threadpool(self.build_chat, body)
        return await self.answer(responses.ChatCompletions(self.tokenizer), body, request, requests)

    async def complete(self, body: schema.CompletionRequest, request: HTTPRequest):
        """Continue texts, without the format of a conversation."""
        requests = await run_in_threadpool(self.build_completions, body)
        return await self.answer(responses.Completions(self.tokenizer), body, request, requests)

    async def embed(self, body: schema.EmbeddingRequest, request: HTTPRequest):
        """Return the mean of each text's last hidden states, of length 1."""
        prompts = await run_in_threadpool(self.encode_texts, body.input, "input")
        size, vectors = self.batcher.max_batch, []
        for first in range(0, len(prompts), size):  # so that a long list needs no long queue
            requests = [Request(ids, is_embedding=True) for ids in prompts[first : first + size]]
            generations = server.submit_all(self.batcher, requests, "input")
            answers = await server.collect(request, generations, self.metrics)
            vectors += [F.normalize(answer.embedding, dim=0) for answer in answers]
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": responses.encode_vector(vector, body.encoding_format),
            }
            for index, vector in enumerate(vectors)
        ]
        num_tokens = sum(map(len, prompts))
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return as_json(
            responses.EmbeddingList(object="list", model=body.model, data=data, usage=usage)
        )

    async def list_models(self):
        """List the one model; requests may name any."""
        return as_json(responses.ModelList(data=[self.card], object="list"))

    async def show_model(self, name: str):
        """Describe the model."""
        if name != self.card.id:
            message = f"There is no model {name!r}, but {self.card.id!r}."
            raise RequestError(404, message, "model", "model_not_found")
        return as_json(self.card)


def as_json(response: BaseModel) -> Response:
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")


def create_app(model, tokenizer, args) -> FastAPI:
    app = server.create_app(model, tokenizer, args, title="ChatGLM2: OpenAI's API")
    name = Path(args.model).resolve().name  # "." has none
    service = Service(model, tokenizer, name, app.state.batcher, app.state.metrics)
    events = {"content": {"text/event-stream": {}}}
    for add, path, handler, response in (
        (app.post, "/v1/chat/completions", service.chat, {"model": ChatCompletion, **events}),
        (app.post, "/v1/completions", service.complete, {"model": Completion, **events}),
        (app.post, "/v1/embeddings", service.embed, {"model": responses.EmbeddingList}),
        (app.get, "/v1/models", service.list_models, {"model": responses.ModelList}),
        (app.get, "/v1/models/{name}", service.show_model, {"model": Model}),
    ):
        add(path, response_model=None, responses={200: response, **server.ERROR_RESPONSES})(handler)
    return app


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    utils.add_server_arguments(parser)
    utils.add_model_arguments(parser)
    args = parser.parse_args(argv)
    listener = server.bind(args)
    tokenizer, model = utils.load_model(args)
    server.run(create_app(model, tokenizer, args), args, listener)


if __name__ == "__main__":
    main()
