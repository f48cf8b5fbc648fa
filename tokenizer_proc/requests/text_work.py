"""Encodes, decodes and renders texts of any caller: small ones at once, others in a queue; too large ones are refused.

A text is encoded by a single call of the tokenizers library, which cannot be ended from outside, because the tokens of
a text are not those of its parts. The call's cost is therefore bounded by the text's size: it takes up to 350 bytes a
character until the tokens are counted, and the text of a context needs few characters a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.journal.work_notes import WorkNotes, digest
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.chat_template import ChatRenderer, ChatTemplate, Value
from tokenizer_proc.text.tokenizer import Tokenizer
from tokenizer_proc.work import freed_memory
from tokenizer_proc.work.pools import WorkPools
from tokenizer_proc.work.queue import Job

INLINE_CHARACTERS = 8192  # encoding these takes about a millisecond; longer texts would stall the event loop
INLINE_IDS = 8192
INLINE_MESSAGES = 64
LARGE_CHARACTERS = 256 << 10  # encoding these takes about a tenth of a second
MOST_CHARACTERS = 4 << 20
LEAST_BOUND = 256 << 10
CHARACTERS_PER_TOKEN = 16
"""A text has at most this many characters for each token of the context, but LEAST_BOUND may have any text."""

TRIM_CHARACTERS = 32 << 10  # encoding these takes about 10 MiB
MOST_TOKENS = 1 << 20  # making a list of these takes about 20 milliseconds, during which the event loop waits
MOST_MESSAGES = 8192


class TextWork:
    """Works on texts, in the queues of `pools` where it may take long. `tenant` is the name of the caller's tenant.

    Work in a queue is noted in `notes`: what ended this process before raises InvalidRequest. `max_length` returns the
    context length in tokens, or 0 while it is unknown.
    """

    def __init__(
        self, pools: WorkPools, notes: WorkNotes | None = None, max_length: Callable[[], int] = lambda: 0
    ) -> None:
        self._pools = pools
        self._max_length = max_length
        self._notes = notes or WorkNotes()

    async def encode(
        self,
        tenant: str,
        tokenizer: Tokenizer,
        text: str,
        special: bool,
        most: int = MOST_TOKENS,
        param: str = "prompt",
    ) -> list[int]:
        """Returns the ids of `text`, with the tokenizer's special tokens if `special`.

        Raises TooManyTokens for more than `most` ids, and InvalidRequest, which names `param`, for a text that is too
        long or that the tokenizer refuses.
        """
        if len(text) <= INLINE_CHARACTERS:
            return tokenizer.encode(text, special, most)
        if len(text) > (bound := self._most_characters()):
            raise InvalidRequest(
                f"the text has {len(text)} characters; a text has at most {bound}",
                param=param,
                code="text_too_long",
            )

        def encoded(job: Job) -> list[int]:
            try:
                with self._notes.working(digest([b"encode", _bytes(text)])):
                    return tokenizer.encode(text, special, most)
            finally:
                if len(text) > TRIM_CHARACTERS:
                    freed_memory.give_back()

        return await self._pools.texts.run(tenant, encoded, len(text) > LARGE_CHARACTERS)

    async def decode(self, tenant: str, tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of `ids`. Raises InvalidRequest for too many ids, or ids outside of the vocabulary."""
        if len(ids) > MOST_TOKENS:
            raise InvalidRequest(f"{len(ids)} tokens: at most {MOST_TOKENS} are decoded at once", param="tokens")

        def decoded(job: Job) -> str:
            _check_ids(ids, tokenizer.vocab_size)
            with self._notes.working(digest([b"decode", array("q", ids).tobytes()])):
                return tokenizer.decode(ids, skip_special_tokens)

        if len(ids) > INLINE_IDS:
            return await self._pools.texts.run(tenant, decoded)
        _check_ids(ids, tokenizer.vocab_size)
        return tokenizer.decode(ids, skip_special_tokens)

    async def render(
        self,
        tenant: str,
        chat: ChatRenderer,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        arguments: Mapping[str, Value],
    ) -> str:
        """Returns the prompt text of `messages`; `arguments` are the call's chat_template_kwargs.

        Raises InvalidRequest for too many messages, for too much text, and if the template refuses the messages.
        """
        if len(messages) > MOST_MESSAGES:
            raise InvalidRequest(
                f"messages has {len(messages)} entries; a chat has at most {MOST_MESSAGES}", param="messages"
            )
        size = _characters(messages, arguments)
        if size > (bound := self._most_characters()):
            raise InvalidRequest(
                f"the messages have {size} characters; a text has at most {bound}",
                param="messages",
                code="text_too_long",
            )
        is_small = size <= INLINE_CHARACTERS and len(messages) <= INLINE_MESSAGES
        if is_small or not isinstance(chat, ChatTemplate):  # others are rendered in a process of their own
            return await chat.prompt(messages, add_generation_prompt, continue_final_message, **arguments)

        def rendered(job: Job) -> str:
            with self._notes.working(digest([b"render", *(_bytes(message.content) for message in messages)])):
                return chat.render(messages, add_generation_prompt, continue_final_message, **arguments)

        return await self._pools.python.run(tenant, rendered, size > LARGE_CHARACTERS)

    def _most_characters(self) -> int:
        """Returns how many characters a text may have."""
        length = self._max_length()
        return min(MOST_CHARACTERS, max(LEAST_BOUND, CHARACTERS_PER_TOKEN * length)) if length else MOST_CHARACTERS


def _characters(messages: Sequence[ChatMessage], arguments: Mapping[str, Value]) -> int:
    """Returns the number of characters that a template is given."""
    values = [value for value in arguments.values() if isinstance(value, str)]
    texts = sum(len(message.content) + len(message.name or "") + _in_calls(message) for message in messages)
    return texts + sum(map(len, values)) + sum(map(len, arguments))


def _in_calls(message: ChatMessage) -> int:
    return 0 if message.tool_calls is None else len(msgspec.json.encode(message.tool_calls))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if not ids or 0 <= min(ids) <= max(ids) < vocab_size:
        return
    place = next(place for place, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise InvalidRequest(
        f"tokens[{place}] = {ids[place]} is outside the vocabulary of {vocab_size} tokens", param=f"tokens[{place}]"
    )
