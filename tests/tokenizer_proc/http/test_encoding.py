"""JSON of large responses: the same bytes as msgspec's, encoded in a thread."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from fixtures.serving.api_calls import ok, post, stream
from fixtures.serving.fake_frontend import FakeFrontend

from tokenizer_proc.http import batch
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.encoding import SLICE, in_slices

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
    large = ok(post(FakeFrontend(), path, body)), stream(FakeFrontend(), path, body)
    assert _timeless(large) == _timeless(small)


def _timeless(value: Any) -> Any:
    """Returns the response without the fields that differ from call to call."""
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in ("id", "created", "e2e_latency")}
    return [_timeless(each) for each in value] if isinstance(value, list | tuple) else value
