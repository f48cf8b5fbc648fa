"""JSON of large responses: the same bytes as msgspec's, encoded in a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import ok, post, serve, stream
from fixtures.serving.fake_frontend import FakeFrontend
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_proc.http import batch, encoding
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.encoding import SLICE, JsonArray, in_slices
from tokenizer_proc.requests import packed_logprobs
from tokenizer_proc.work.queue import Abandoned

ECHO = {"prompt": "ab", "echo": True, "logprobs": 2}
SCORED = {"text": "ab", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
CALLS = [("/v1/completions", ECHO), ("/generate", SCORED)]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "a\u00e9",
        {"a": [1.5] * (2 * SLICE + 1), "b": {"c": [{"d": [None] * (SLICE + 1)}, []], "e\n": float("inf")}},
        [[{"x": (1, None)}]] * (SLICE + 1),
        [{"x": list(range(SLICE))}, msgspec.Raw(b"[1,2]")],
    ],
)
def test_sliced_json_equals_msgspecs(value: Any) -> None:
    assert in_slices(value) == msgspec.json.encode(value)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(st.text(max_size=4), inner, max_size=5)
        | inner.map(lambda value: msgspec.Raw(msgspec.json.encode(value)))
    ),
    max_leaves=40,
)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(1, 4))
def test_any_value_in_slices_equals_the_whole(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SLICE", size)
        assert in_slices(value) == msgspec.json.encode(value)


@given(st.lists(st.lists(st.integers() | st.text(max_size=3), max_size=4), max_size=6))
def test_an_array_in_the_making_equals_the_whole(slices: list[list[Any]]) -> None:
    array, other = JsonArray(), JsonArray()
    for number, values in enumerate(slices):
        (array if number % 3 else other).add(values)
    other.add_array(array)
    in_order = [slices[number] for number in range(len(slices)) if number % 3 == 0]
    in_order += [slices[number] for number in range(len(slices)) if number % 3]
    expected = msgspec.json.encode([value for values in in_order for value in values])
    assert bytes(other.raw()) == expected == b"".join(other.parts())


def test_a_check_ends_the_encoding_between_slices() -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise Abandoned

    with pytest.raises(Abandoned):
        in_slices({"a": list(range(10 * SLICE))}, check)
    assert checks == 3


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=[True, False], ids=["large", "small"])
def is_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(batch, "LARGE", 1, raising=False)
    return bool(request.param)


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize("streams", [True, False])
def test_a_large_answer_is_encoded_in_a_thread(
    path: str, body: dict[str, Any], streams: bool, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    floored = logprobs.floored

    def watched(token: Any) -> float:
        seen.append(_on_loop())
        return floored(token)

    monkeypatch.setattr(logprobs, "floored", watched)
    if streams:
        assert stream(FakeFrontend(), path, body)[-1] == "[DONE]"
    else:
        ok(post(FakeFrontend(), path, body))
    assert set(seen) == {not is_large}


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_a_large_answer_equals_a_small_one(path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = ok(post(FakeFrontend(), path, body)), stream(FakeFrontend(), path, body)
    monkeypatch.setattr(batch, "LARGE", 1)
    monkeypatch.setattr(packed_logprobs, "SLICE_ENTRIES", 2)
    monkeypatch.setattr(encoding, "SLICE", 1)
    large = ok(post(FakeFrontend(), path, body)), stream(FakeFrontend(), path, body)
    assert _timeless(large) == _timeless(small)


def _timeless(value: Any) -> Any:
    """Returns the response without the fields that differ from call to call."""
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in ("id", "created", "e2e_latency")}
    return [_timeless(each) for each in value] if isinstance(value, list | tuple) else value


def test_a_client_that_leaves_ends_the_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the prompts has a slice of its own, and the one that is written when the client leaves is the last."""
    monkeypatch.setattr(batch, "LARGE", 1)
    monkeypatch.setattr(packed_logprobs, "SLICE_ENTRIES", 2)
    begun, go, written = threading.Event(), threading.Event(), 0
    floored = logprobs.floored

    def held(token: Any) -> float:
        nonlocal written
        written += 1
        begun.set()
        assert go.wait(20)
        return floored(token)

    monkeypatch.setattr(logprobs, "floored", held)
    frontend = FakeFrontend()

    async def scenario(client: TestClient) -> None:
        asked = asyncio.ensure_future(client.post("/v1/completions", json=ECHO | {"prompt": ["abc"] * 50}))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        asked.cancel()
        await asyncio.wait([asked])
        while frontend.left < 50:
            await asyncio.sleep(0.001)
        go.set()
        while frontend.pools.python.running:
            await asyncio.sleep(0.001)

    serve(frontend, scenario)
    of_a_slice = 3 * 3 + 3  # positions, each with two alternatives
    assert 0 < written <= 2 * of_a_slice, "of 50 prompts"
