"""The embedded engine: one class that starts the whole server as a child process, without importing torch.

    async with Engine(model_path=..., lora_paths=[...]) as engine:
        async for delta in engine.generate("Hello", lora="pirate"):
            print(delta.text, end="")

`Engine.connect(address)` connects to a running engine. Requests go to the tokenizer process, like those over HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import msgspec

from engine.client.adapter_calls import AdapterCalls, CommandName
from engine.client.completion import Completion, join
from engine.client.connection import Connection
from engine.client.lora_request import LoRARequest
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError, EngineDead, InvalidRequest
from engine.messages import AdapterMix, Answer, ChatMessage, Command, Delta, SamplingParams, Submit
from engine.processes.process import Process, ProcessSpec

Prompt = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]]
Lora = str | Mapping[str, float] | LoRARequest | None

STOP_SECONDS = 30.0
NOT_OPEN = "the engine is not open: use `async with Engine(...) as engine`"


class Engine(AdapterCalls):
    """An engine: started and stopped by `async with`, or already running and reached with `connect`.

    The keyword arguments are the command line's flags with underscores (engine.config.server_args); without a `port`
    there is no HTTP server. Raises ConfigError for a bad flag. Entering `async with` raises the error that kept the
    engine from serving.
    """

    def __init__(self, model_path: str | None = None, **flags: Any) -> None:
        super().__init__()
        self._args: ServerArgs | None = _args({"port": None, "log_level": "warning", **flags, "model_path": model_path})
        self._address = ""
        self._process: Process | None = None
        self._connection: Connection | None = None

    @classmethod
    def connect(cls, address: str) -> Engine:
        """Returns a client of a running engine. `address` is the one its banner shows as Engine.connect(...)."""
        engine = cls()
        engine._args, engine._address = None, address
        return engine

    async def __aenter__(self) -> Self:
        if self._args is not None:
            self._process = await Process.start(ProcessSpec("engine", "engine.launch", self._args, ["--embedded"]))
            try:
                self._address = str((await self._process.report()).facts["address"])
            except BaseException:
                await self._process.stop(STOP_SECONDS)
                raise
        self._connection = Connection(self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        if self._process is not None:
            await self._process.stop(STOP_SECONDS)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: Lora = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """Streams the completion of a prompt; leaving the loop early cancels the request.

        `prompt` is text, token ids, or a chat (messages as dicts or ChatMessage). `lora` is an adapter's name, a
        LoRARequest (loaded on first use), a weighted mix {name: scale}, or None for the base. `options` are further
        fields of messages.Submit. With n > 1 the deltas of the choices are interleaved. A slow consumer does not block
        other requests: unread deltas are kept, at most the whole completion. Raises InvalidRequest, NotFound,
        Overloaded, EngineDead.
        """
        connection = self._open()
        submit = Submit(
            id=connection.new_id(),
            prompt=_prompt(prompt),
            params=params or SamplingParams(),
            lora=await self._adapter(lora),
            **options,
        )
        async with connection.call(submit) as call:
            unfinished = submit.params.n
            while True:  # ends by return, or by the Failure for an invalid n
                delta = await call.next()
                assert isinstance(delta, Delta)
                unfinished -= delta.finish_reason is not None
                yield delta
                if not unfinished:
                    return

    async def generate_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Lora | Sequence[Lora] = None,
        **options: Any,
    ) -> list[Completion]:
        """Generates from all prompts concurrently and returns the completions in the prompts' order.

        `params` and `lora` are either one value for all prompts or a list with one for each.
        """
        each_params = _each(params, len(prompts), "params")
        each_lora = _each(lora, len(prompts), "lora")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._complete(prompt, own_params, own_lora, options))
                    for prompt, own_params, own_lora in zip(prompts, each_params, each_lora, strict=True)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def info(self) -> dict[str, Any]:
        """Returns configuration, capacity and counters of the engine."""
        answer = await self._command("info")
        return {name: msgspec.msgpack.decode(value) for name, value in answer.info.items()}

    def _open(self) -> Connection:
        if self._connection is None:
            raise EngineDead(NOT_OPEN)
        return self._connection

    async def _command(self, call: CommandName, **fields: Any) -> Answer:
        connection = self._open()
        async with connection.call(Command(id=connection.new_id(), call=call, **fields)) as open_call:
            answer = await open_call.next()
            assert isinstance(answer, Answer)
            return answer

    async def _adapter(self, lora: Lora) -> str | AdapterMix | None:
        if isinstance(lora, LoRARequest):
            await self._first_use(lora)
            return lora.lora_name
        return dict(lora) if isinstance(lora, Mapping) else lora

    async def _complete(
        self, prompt: Prompt, params: SamplingParams | None, lora: Lora, options: dict[str, Any]
    ) -> Completion:
        if params is not None and params.n != 1:
            raise InvalidRequest("generate_all takes n=1: repeat the prompt, or use generate", param="n")
        return join([delta async for delta in self.generate(prompt, params, lora=lora, **options)])


def _args(flags: dict[str, Any]) -> ServerArgs:
    try:
        return msgspec.convert(flags, ServerArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Engine(...): {error}") from error


def _prompt(prompt: Prompt) -> str | list[int | ChatMessage]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray):
        raise InvalidRequest("prompt: bytes are neither text nor token ids; decode them first", param="prompt")
    try:
        return msgspec.convert(list(prompt), list[int | ChatMessage])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"prompt: {error}", param="prompt") from error


def _each(value: Any, count: int, name: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name}: {len(value)} for {count} prompts", param=name)
    return value
