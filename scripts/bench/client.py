"""A client of one server: its models, and streamed completions with the times of their chunks.

Handles HTTP and server-sent events. `workload` makes the requests, and `loops` decides when they are sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.workload import Request

LINE_BYTES = 1 << 20  # the longest line of server-sent events that is accepted


@dataclass
class Sample:
    """Times of one request in seconds since it was due: `pieces` of each chunk with tokens, `latency` of the last."""

    adapter: str | None
    wanted: int
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    input_tokens: int = 0
    latency: float = 0.0
    error: str | None = None


class ServerError(Exception):
    """The server returned an error. The message is a short kind of error, by which errors are counted."""


class Server:
    """One OpenAI-compatible server."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str | None = None,
        adapter_field: str = "model",
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """`decode` converts ids to text for servers that take no ids; `adapter_field` is model, lora_path or both."""
        self.session, self.url, self.model = session, url.rstrip("/").removesuffix("/v1"), model
        self.adapter_field, self.decode = adapter_field, decode

    async def discover(self) -> list[str]:
        """Returns the adapters in `/v1/models` (cards with a parent).

        If no model was given, the first card without a parent becomes the model.
        """
        async with self.session.get(f"{self.url}/v1/models") as response:
            response.raise_for_status()
            cards = (await response.json())["data"]
        adapters = [card["id"] for card in cards if card.get("parent")]
        if self.model is None:
            self.model = next((card["id"] for card in cards if not card.get("parent")), None)
        return adapters

    def body(self, request: Request) -> dict[str, Any]:
        """The body of a completion request: greedy, streamed with usage, and of exactly the requested length."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": self.decode(request.prompt) if self.decode else request.prompt,
            "max_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.adapter is not None:
            if self.adapter_field != "lora_path":
                body["model"] = request.adapter
            if self.adapter_field != "model":
                body["lora_path"] = request.adapter
        return body

    async def send(self, request: Request, due: float) -> Sample:
        """Sends one request, timed from `due` (a `perf_counter` time). Errors are recorded in the Sample."""
        sample = Sample(request.adapter, request.output_len)
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=self.body(request)) as response:
                if response.status != 200:
                    raise ServerError(await _refusal(response))
                await self._read(response, sample, due)
            if not sample.pieces:
                raise ServerError("empty stream")
        except ServerError as error:
            sample.error = str(error)
        except TimeoutError:
            sample.error = "timeout"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            sample.error = type(error).__name__
        return sample

    async def _read(self, response: aiohttp.ClientResponse, sample: Sample, due: float) -> None:
        counted = None
        async for event in events(response):
            if "error" in event:
                raise ServerError("error in stream")
            choices = event.get("choices")
            if choices:
                sample.latency = time.perf_counter() - due
                if any(_carries_tokens(choice) for choice in choices):
                    sample.pieces.append(sample.latency)
            usage = event.get("usage")
            if usage:
                counted, sample.input_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens", 0)
        sample.tokens = len(sample.pieces) if counted is None else counted


def _carries_tokens(choice: dict[str, Any]) -> bool:
    """Returns whether a chunk has tokens: text, or (half a character, a special token) no text and no finish reason."""
    return bool(choice.get("text")) or choice.get("finish_reason") is None


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """Returns e.g. `HTTP 404 model_not_found`: the status, and the error's code or type if the body is OpenAI's."""
    try:
        error = (await response.json())["error"]
        return f"HTTP {response.status} {error.get('code') or error.get('type') or ''}".strip()
    except (aiohttp.ClientError, ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {response.status}"


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yields the JSON of each `data:` line up to `[DONE]`. Raises ServerError if the stream ends before `[DONE]`."""
    async for raw in response.content:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
    raise ServerError("stream cut short")


def open_session(api_key: str | None, timeout: float) -> aiohttp.ClientSession:
    """Returns a session without a limit on its connections; each whole request may take `timeout` seconds."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout),
        read_bufsize=LINE_BYTES,
    )
