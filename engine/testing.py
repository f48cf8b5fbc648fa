"""A fake engine for tests of programs that embed Engine: the same calls and errors, without processes or models.

    engine = FakeEngine({"What is the capital of France?": "Paris."}, adapters=["pirate"])

Each word of a reply counts as one token.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self

import msgspec

from engine.client.adapter_calls import CommandName, not_found
from engine.client.engine import NOT_OPEN, Engine, Lora, Prompt
from engine.errors import EngineDead, InvalidRequest
from engine.messages import AdapterCard, Answer, Delta, FinishReason, SamplingParams, Usage

Reply = Callable[[str, str | None], str]


class FakeEngine(Engine):
    """An Engine that generates texts from `replies`.

    `replies` is a mapping from prompt text to reply, or a function of (prompt text, adapter name or None). A prompt
    that the mapping lacks is echoed. The text of a prompt of token ids is its numbers, that of a chat its last message.
    An adapter that was neither listed nor loaded raises NotFound; any path can be loaded. The name of a mix is its
    adapters joined with "+". `requests` records the calls.
    """

    def __init__(self, replies: Mapping[str, str] | Reply | None = None, *, adapters: Sequence[str] = ()) -> None:
        super().__init__()
        self._reply: Reply = replies if callable(replies) else _from_table(replies or {})
        self._ids = itertools.count(1)
        self._cards = {name: _card(next(self._ids), name, name) for name in adapters}
        self.requests: list[tuple[Prompt, SamplingParams, Lora]] = []
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_open = False

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: Lora = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """Like Engine.generate: yields a delta for each word, up to `max_tokens`; the n choices follow one another."""
        self._check_open()
        params = params or SamplingParams()
        adapter = self._named(await self._adapter(lora))
        text = _text(prompt)
        self.requests.append((prompt, params, lora))
        words = self._reply(text, adapter).split()
        if not words:
            raise InvalidRequest("the fake has an empty answer for this prompt", param="prompt")
        for index in range(params.n):
            for delta in _deltas(index, words, len(text.split()), params.max_tokens):
                yield delta

    async def info(self) -> dict[str, Any]:
        """Returns {"fake": True}."""
        self._check_open()
        return {"fake": True}

    async def _command(self, call: CommandName, **fields: Any) -> Answer:
        self._check_open()
        if call == "list":
            return Answer(id=0, adapters=list(self._cards.values()))
        name = str(fields["lora_name"])
        if call == "load":
            card = self._load(name, **fields)
        elif name not in self._cards:
            raise not_found(name)
        elif call == "unload":
            card = self._cards.pop(name)
        else:
            card = self._cards[name] = msgspec.structs.replace(self._cards[name], pinned=call == "pin")
        return Answer(id=0, adapters=[card])

    def _check_open(self) -> None:
        if not self._is_open:
            raise EngineDead(NOT_OPEN)

    def _load(self, name: str, lora_path: str = "", pinned: bool = False, **fields: Any) -> AdapterCard:
        if name in self._cards and not fields.get("load_inplace"):
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded.", param="lora_name", code="adapter_already_loaded"
            )
        card = _card(next(self._ids), name, lora_path, pinned)
        self._cards[name] = card
        return card

    def _named(self, lora: str | dict[str, float] | None) -> str | None:
        names = [] if lora is None else [lora] if isinstance(lora, str) else sorted(lora)
        for name in names:
            if name not in self._cards:
                raise not_found(name)
        return "+".join(names) or None


def _card(adapter_id: int, name: str, path: str, pinned: bool = False) -> AdapterCard:
    return AdapterCard(
        name=name, adapter_id=adapter_id, path=path, root=path, parent="fake", state="resident", pinned=pinned
    )


def _from_table(table: Mapping[str, str]) -> Reply:
    return lambda text, _: table.get(text, text)


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    last = prompt[-1]
    if isinstance(last, int):
        return " ".join(str(token) for token in prompt)
    return last["content"] if isinstance(last, Mapping) else last.content


def _deltas(index: int, words: list[str], prompt_tokens: int, max_tokens: int | None) -> list[Delta]:
    kept = words if max_tokens is None else words[:max_tokens]
    finish: FinishReason = "stop" if len(kept) == len(words) else "length"
    usage = Usage(prompt_tokens, len(kept))
    return [
        Delta(
            id=0,
            index=index,
            text=word if number == 0 else " " + word,
            token_ids=[number],
            finish_reason=finish if number == len(kept) - 1 else None,
            usage=usage if number == len(kept) - 1 else None,
        )
        for number, word in enumerate(kept)
    ]
