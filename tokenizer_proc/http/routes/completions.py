"""The route POST /v1/completions: one or more prompts with n choices each, echo, and legacy log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from aiohttp import web
from msgspec.structs import replace

from engine.messages import Delta, PositionLogprobs, SamplingParams, Submit
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.batch import Batch, Choice
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.fields import SPELLINGS_OPENAI
from tokenizer_proc.http.bodies.prompts import PromptField, TokenIds, paced, prompts, spread
from tokenizer_proc.http.dialects.logprobs import LegacyLogprobs, LegacyPiece
from tokenizer_proc.http.dialects.openai import Envelope, LoraField, OpenAIBody, abort_ids, check, of_prompt, token_ids
from tokenizer_proc.http.generation import GenerationCall, Writer, answer
from tokenizer_proc.http.service import Service
from tokenizer_proc.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16

Slices = Iterable[Sequence[PositionLogprobs | None]]


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """The fields of the body, without the sampling parameters."""

    prompt: PromptField
    lora_path: LoraField | list[LoraField | None] | None = None
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


async def completions(service: Service, request: web.Request) -> web.StreamResponse:
    """OpenAI's completions for one or more prompts, streamed or not, with `lora_path` and vLLM's extras."""
    fields = await decoding.read(request)
    body, params = decoding.split(fields, CompletionBody, SPELLINGS_OPENAI)
    check(body, params)
    asked = prompts(body.prompt, "prompt", service.config.max_open_requests)
    named = body.lora_path if isinstance(body.lora_path, list) else [body.lora_path]
    await adapter_access.fetch(service, request, body.model, *named)
    spread_out = spread(body.lora_path, len(asked), "lora_path")
    loras = [adapter_access.select(service, request, body.model or None, lora) async for lora in paced(spread_out)]
    envelope = Envelope(service, body, "cmpl", "text_completion", "text_completion")
    tokenizers = [service.frontend.text_tools_for(lora).tokenizer for lora in loras]
    writer = CompletionWriter(envelope, tokenizers, body, asked)
    submits = _submits(body, _params(body, params), asked, loras)
    ids = abort_ids(body, envelope, range(len(submits)))
    names = decoding.spelt(fields, SPELLINGS_OPENAI)
    if body.prompt_logprobs is None:
        names["prompt_logprobs"] = "logprobs"
    call = GenerationCall(submits=submits, ids=ids, stream=body.stream, names=names)
    return await answer(service, request, call, writer)


def _params(body: CompletionBody, params: SamplingParams) -> SamplingParams:
    asked = [top for top in (body.logprobs if body.echo else None, body.prompt_logprobs) if top is not None]
    return replace(params, logprobs=body.logprobs, prompt_logprobs=max(asked, default=None))


def _submits(
    body: CompletionBody,
    params: SamplingParams,
    asked: Sequence[str | TokenIds],
    loras: Sequence[LoraField | None],
) -> list[Submit]:
    return [
        Submit(
            id=number,
            prompt=prompt if isinstance(prompt, str) else [*prompt],
            params=params,
            lora=lora,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            add_special_tokens=body.add_special_tokens,
            priority=body.priority,
            cache_salt=body.cache_salt,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
        )
        for number, (prompt, lora) in enumerate(zip(asked, loras, strict=True))
    ]


class CompletionWriter(Writer):
    """Writes completions.

    With echo and log-probabilities, a choice's first event is held until the prompt's log-probabilities have arrived.
    """

    def __init__(
        self,
        envelope: Envelope,
        tokenizers: Sequence[Tokenizer],
        body: CompletionBody,
        asked: Sequence[str | TokenIds],
    ) -> None:
        self._envelope = envelope
        self._body = body
        self._tokenizers = tokenizers
        self._echo = body.echo
        self._scores = body.logprobs is not None
        self._asked = asked
        self._cursors: dict[int, _Cursor] = {}
        self._held: dict[int, dict[int, _Cursor]] = {}  # by prompt, the choices held for its log-probabilities
        self._echoes: dict[int, LegacyPiece] = {}  # by prompt, its complete log-probabilities

    def events(self, batch: Batch, choice: Choice, delta: Delta) -> list[object]:
        """Returns events with new output of `choice`, and of choices held for the same prompt's log-probabilities."""
        cursor = self._cursors.get(choice.number)
        if cursor is None:
            cursor = self._cursors[choice.number] = self._cursor(choice)
        if self._echo and self._scores and choice.prompt.awaits_logprobs:
            self._held.setdefault(choice.item, {})[choice.number] = cursor
            return []
        due = self._held.pop(choice.item, {}) | {choice.number: cursor}
        return [self._envelope.chunk([self._choice(one)], one.choice.usage) for one in due.values() if one.has_output]

    def last_events(self, batch: Batch) -> list[object]:
        """Returns an event with the usage, if the client requested it."""
        return self._envelope.usage_chunks(batch.usage())

    def whole(self, batch: Batch) -> object:
        """Returns the body of a response that is not streamed: a text_completion object."""
        cursors = [self._cursor(choice) for choice in batch.choices]
        return self._envelope.whole([self._choice(cursor) for cursor in cursors], batch.usage())

    def _cursor(self, choice: Choice) -> _Cursor:
        legacy = LegacyLogprobs(
            self._tokenizers[choice.item], self._body.logprobs or 0, self._body.return_tokens_as_token_ids
        )
        return _Cursor(choice, legacy)

    def _choice(self, cursor: _Cursor) -> dict[str, object]:
        """Returns the part of a choice's output that was not sent yet, and advances the cursor over it."""
        choice, is_first = cursor.choice, cursor.deltas == 0
        echoes = self._echo and is_first
        text, positions, ids = cursor.advance()
        shown = self._shown(choice) if echoes else ""
        return {
            "index": choice.number,
            "text": shown + text,
            "logprobs": self._logprobs(cursor, positions, shown, echoes) if self._scores else None,
            "finish_reason": choice.finish_reason,
            **token_ids(self._body, ids),
            **(of_prompt(self._body, choice.prompt) if is_first else {}),
        }

    def _logprobs(self, cursor: _Cursor, positions: Slices, shown: str, echoes: bool) -> dict[str, msgspec.Raw]:
        piece = LegacyPiece()
        if echoes:
            piece.add_piece(self._echo_of(cursor, shown))
        piece.add_piece(cursor.legacy.generated(positions))
        return piece.raw()

    def _echo_of(self, cursor: _Cursor, shown: str) -> LegacyPiece:
        """Returns the piece of the choice's prompt, whose text is `shown`. The choices of one prompt share it."""
        prompt, item = cursor.choice.prompt, cursor.choice.item
        found = self._echoes.get(item)
        if found is not None:
            cursor.legacy.skip(shown)
            return found
        found = cursor.legacy.prompt(prompt.token_ids, prompt.logprobs, shown)
        if prompt.logprobs is not None:
            self._echoes[item] = found
        return found

    def _shown(self, choice: Choice) -> str:
        prompt = self._asked[choice.item]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        return self._tokenizers[choice.item].decode(choice.prompt.token_ids, skip_special_tokens=False)


class _Cursor:
    """The position in a choice's output up to which it was sent."""

    def __init__(self, choice: Choice, legacy: LegacyLogprobs) -> None:
        self.choice = choice
        self.legacy = legacy
        self.deltas = 0
        self._text = 0
        self._positions = 0
        self._tokens = 0

    @property
    def has_output(self) -> bool:
        """Whether there is output to send: the first delta, the last one, or new tokens, even without text."""
        choice = self.choice
        grew = len(choice.token_ids) > self._tokens or len(choice.logprobs) > self._positions
        return self.deltas < choice.deltas and (self.deltas == 0 or grew or choice.finish_reason is not None)

    def advance(self) -> tuple[str, Slices, list[int]]:
        """Returns the text, the positions with log-probabilities, and the tokens added since the last call."""
        choice = self.choice
        added = choice.text[self._text :], choice.logprobs.slices(self._positions), choice.token_ids[self._tokens :]
        self.deltas, self._text = choice.deltas, len(choice.text)
        self._positions, self._tokens = len(choice.logprobs), len(choice.token_ids)
        return added
