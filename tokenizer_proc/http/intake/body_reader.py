"""Reads the body of a request piece by piece, and decodes it.

    piece arrives --> memory is asked for --> shape is counted --> ... --> decoded, a large body in slices

A body is refused at the piece with which it exceeds a bound; what follows is neither kept nor decoded.
"""

from __future__ import annotations

import asyncio
import re

import msgspec
from aiohttp import StreamReader, web

from engine.errors import EngineError, InvalidRequest
from tokenizer_proc.http.intake import slices
from tokenizer_proc.http.intake.memory_budget import BodyTooLarge, MemoryAccount, MemoryBudget
from tokenizer_proc.http.intake.shape import STEP, ShapeScan

PIECE = 64 << 10  # bytes
SMALL = 64 << 10  # bytes of a body that is decoded at once
TINY = 4 << 10  # bytes of a body that needs no scan: it cannot even hold many numbers with an exponent
TINY_FACTOR = 24  # bytes of objects that a byte of a body can become, at most
LEAST_RATE = 16 << 10  # bytes a second at which a body must arrive after --read-timeout

RAW, DECODED, ANSWER, UNREAD = "body", "decoded body", "answer", "unread"  # the parts of an account

_EXPONENT = re.compile(rb"[0-9.][eE]\+?[0-9]{2}")


class BodyTimeout(EngineError):
    """A body arrives too slowly."""

    status = 408
    kind = "timeout_error"


class Intake:
    """What all requests of a server share: the memory budget, the bounds of bodies, the turn to work on a large one.

    A request that has the turn scans a piece or decodes a slice, and keeps the turn until the event loop has run once:
    however many large bodies arrive, each step of the loop works on one. `read_timeout` are the seconds in which a body
    must arrive; each LEAST_RATE bytes of it give another second.
    """

    def __init__(self, budget: MemoryBudget, max_body_bytes: int, read_timeout: float) -> None:
        self.budget = budget
        self.max_body_bytes = max_body_bytes
        self.read_timeout = read_timeout
        self.turn = asyncio.Lock()


INTAKE: web.AppKey[Intake] = web.AppKey("intake", Intake)
"""The key under which an application stores its Intake."""

ACCOUNT = web.RequestKey("account", MemoryAccount)
"""The key under which a request stores its MemoryAccount."""


async def read_json(request: web.Request) -> object:
    """Returns the decoded body. Its memory is counted in the request's account.

    Raises InvalidRequest (400) for a body that is no JSON or has too many values, BodyTooLarge (413), BodyTimeout
    (408), and Overloaded (503) if the memory for requests is used up.
    """
    stream, account, intake = request.content, request[ACCOUNT], request.app[INTAKE]
    try:
        body = stream.read_nowait(TINY) if stream.is_eof() else b""
        if body and stream.at_eof() and len(body) <= intake.max_body_bytes:
            account.add(DECODED, TINY_FACTOR * len(body))
            return _decode(body)
        return await _read_large(stream, body, intake, account, request.content_length or 0)
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be read: {' '.join(str(error).split())}") from error
    except EngineError as error:
        error.__cause__ = error.__context__ = None
        raise error.with_traceback(None) from None  # the frames hold the body, and the answer the error


async def _read_large(
    stream: StreamReader, piece: bytes, intake: Intake, account: MemoryAccount, length: int
) -> object:
    body, scan = await _read(stream, piece, intake, account, length)
    account.add(DECODED, _decoded_bytes(body) if scan is None else scan.decoded_bytes)
    value = _decode(body) if scan is None else await _decode_in_slices(intake, body, scan)
    account.set(RAW, 0)
    return value


async def _read(
    stream: StreamReader, piece: bytes, intake: Intake, account: MemoryAccount, length: int
) -> tuple[bytearray, ShapeScan | None]:
    """Returns the body, of which `piece` has been read, and the scan of one that is not small."""
    body, scan = bytearray(), None
    began = asyncio.get_running_loop().time()
    while True:
        if max(length, len(body)) > intake.max_body_bytes:
            raise BodyTooLarge(f"the body is too large: it has more than {intake.max_body_bytes} bytes")
        piece = piece or await _piece(stream, began + intake.read_timeout + len(body) / LEAST_RATE)
        account.add(RAW, len(piece) * 9 // 8)  # a bytearray that grows has an eighth to spare
        body += piece
        piece = b""
        is_whole = stream.at_eof()
        if len(body) > SMALL or (is_whole and len(body) > TINY and _EXPONENT.search(body)):
            scan = scan or ShapeScan()
            if is_whole or len(body) - scan.scanned >= STEP:
                async with intake.turn:
                    scan.feed(body)
                    await asyncio.sleep(0)
        if is_whole:
            return body, scan


async def _piece(stream: StreamReader, until: float) -> bytes:
    """Returns at most PIECE bytes. Raises BodyTimeout if none has arrived at the time `until` of the event loop."""
    if (piece := stream.read_nowait(PIECE)) or stream.at_eof():
        return piece
    try:
        async with asyncio.timeout_at(until):
            return await stream.read(PIECE)
    except TimeoutError:
        raise BodyTimeout(f"the body arrives too slowly (--read-timeout, and {LEAST_RATE} bytes a second)") from None


def _decode(body: bytes | bytearray) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.strip():
            raise InvalidRequest("the body is empty; send a JSON object") from None
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


async def _decode_in_slices(intake: Intake, body: bytearray, scan: ShapeScan) -> object:
    """Decodes a body while everything else goes on, one slice in each turn."""
    work = slices.decode(body, scan.marks)
    while True:
        async with intake.turn:
            try:
                next(work)
            except StopIteration as end:
                return end.value
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"the body is not valid JSON: {error}") from error
            await asyncio.sleep(0)


def _decoded_bytes(body: bytearray) -> int:
    """Returns a bound on the memory of the objects that a small body is decoded to."""
    text = len(body) if body.isascii() and b"\\" not in body else 4 * len(body)
    return text + 64 * (body.count(b",") + body.count(b":") + 1) + 192 * (body.count(b"[") + body.count(b"{"))
