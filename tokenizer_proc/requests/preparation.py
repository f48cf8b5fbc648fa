"""Prepares a submit to be sent to the scheduler: selects its adapters, encodes its prompt, validates its parameters."""

from __future__ import annotations

import random

import msgspec

from engine.config.process_configs import TokenizerConfig
from engine.errors import NotFound, Overloaded
from engine.messages import AdapterMix, Capacity, Submit
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.adapters.resolver import Resolver
from tokenizer_proc.adapters.selection import AdapterSelection
from tokenizer_proc.adapters.tokenizers import TextTools
from tokenizer_proc.requests.prompt_encoding import encode_prompt
from tokenizer_proc.requests.text_work import TextWork
from tokenizer_proc.requests.token_limits import encode_bad_words
from tokenizer_proc.requests.validation import SEEDS, ValidatedParams, check_priority, validate_params
from tokenizer_proc.text.tokenizer import Tokenizer

ATTEMPTS = 5
"""How often a prompt is encoded at most.

It is encoded again if its adapter's name was meanwhile re-pointed to an adapter with other text tools.
"""


class PreparedRequest(msgspec.Struct, frozen=True):
    """A validated submit, with all that a stream needs to send it to the scheduler."""

    prompt_ids: list[int]
    params: ValidatedParams
    selection: AdapterSelection
    tokenizer: Tokenizer


class RequestPreparer:
    """Prepares submits. `base` are the base model's text tools; `texts` encodes the prompts.

    A `resolver`, if given, loads unknown adapters.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        adapters: AdapterRegistry,
        base: TextTools,
        resolver: Resolver | None,
        texts: TextWork,
    ) -> None:
        self._has_priorities = config.priorities
        self._adapters = adapters
        self._base = base
        self._texts = texts
        self._resolver = resolver
        self._seeds = random.Random(config.seed)

    async def prepare(self, submit: Submit, capacity: Capacity) -> PreparedRequest:
        """Returns the prepared submit.

        Raises InvalidRequest, NotFound or AdapterError for a submit that is refused, and Overloaded if its adapter's
        name was re-pointed during each of ATTEMPTS attempts to encode the prompt.
        """
        check_priority(submit.priority, self._has_priorities)
        selection, text_tools, prompt_ids = await self._encode(submit, capacity)
        if self._resolver is not None:
            self._resolver.touch(selection.names)
        params = self._validate(submit, capacity, selection, text_tools, prompt_ids)
        return PreparedRequest(prompt_ids, params, selection, text_tools.tokenizer)

    def text_tools_of(self, selection: AdapterSelection) -> TextTools:
        """Returns the tokenizer, chat template and generation config that requests with this selection use."""
        return selection.text_tools or self._base

    async def _encode(self, submit: Submit, capacity: Capacity) -> tuple[AdapterSelection, TextTools, list[int]]:
        """Returns the selected adapters, their text tools, and the prompt's ids as encoded with these tools.

        An adapter's name may be re-pointed while the prompt is encoded in a thread. The names are therefore resolved
        again after encoding, so that the request is sent with the adapter that its name refers to by then.
        """
        max_length = max_request_length(capacity)
        selection = await self._select(submit.lora, capacity)
        for _ in range(ATTEMPTS):
            text_tools = self.text_tools_of(selection)
            with selection.held():  # keeps the resolver from unloading the adapter as idle
                prompt_ids = await encode_prompt(submit, text_tools, max_length, self._texts)
            if not selection.is_current:
                selection = self._select_known(submit.lora, capacity)
            if self.text_tools_of(selection) is text_tools:
                return selection, text_tools, prompt_ids
        raise Overloaded("its adapter is being replaced all the time")

    async def _select(self, lora: str | AdapterMix | None, capacity: Capacity) -> AdapterSelection:
        """Returns the selection that `lora` names. If there is a resolver, unknown adapters are loaded first."""
        try:
            return self._select_known(lora, capacity)
        except NotFound:
            if self._resolver is None:
                raise
        await self._resolver.fetch_named(None, lora)
        return self._select_known(lora, capacity)

    def _select_known(self, lora: str | AdapterMix | None, capacity: Capacity) -> AdapterSelection:
        selection = self._adapters.resolve(lora)
        selection.check(capacity.max_lane_pages)
        return selection

    def _validate(
        self,
        submit: Submit,
        capacity: Capacity,
        selection: AdapterSelection,
        text_tools: TextTools,
        prompt_ids: list[int],
    ) -> ValidatedParams:
        own = selection.own_vocabulary
        return validate_params(
            submit.params,
            generation_config=text_tools.generation_config,
            seed=self._seeds.randrange(SEEDS),
            prompt=prompt_ids,
            max_length=max_request_length(capacity),
            vocab_size=capacity.vocab_size if own is None else own.vocab_size,
            default_max_tokens=submit.default_max_tokens,
            adapter=None if own is None else own.name,
            bad_words=encode_bad_words(submit.params.bad_words, text_tools.tokenizer),
        )


def max_request_length(capacity: Capacity) -> int:
    """Returns the largest number of tokens that a request may have, prompt and output together."""
    return min(capacity.max_length, capacity.kv_pages * capacity.page_size)
