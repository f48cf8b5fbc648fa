"""Bodies are bounded by their shape before objects are made of them, whatever they hold."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import msgspec
import pytest

from engine.errors import InvalidRequest
from tokenizer_proc.http.intake import shape, slices, strings
from tokenizer_proc.http.intake.shape import ShapeScan

LARGE = 32 << 20


def filled(head: bytes, item: bytes, tail: bytes = b"") -> bytes:
    return head + item * ((LARGE - len(head) - len(tail)) // len(item)) + tail


HOSTILE: list[tuple[str, Callable[[], bytes], str | None, str]] = [
    ("lists", lambda: filled(b'{"input_ids":[', b"[],"), "input_ids", "65536 lists"),
    ("objects", lambda: filled(b'{"messages":[', b"{},"), "messages", "values"),
    ("ints", lambda: filled(b'{"input_ids":[', b"1,"), "input_ids", "1200000 values"),
    ("stop ids", lambda: filled(b'{"stop_token_ids":[', b"1,"), "stop_token_ids", "65536 values"),
    ("stops", lambda: filled(b'{"prompt":"a","stop":[', b'"a",'), "stop", "65536 values"),
    ("biases", lambda: filled(b'{"logit_bias":{', b'"1":1,'), "logit_bias", "values"),
    ("mix", lambda: filled(b'{"lora_path":{', b'"a":1,'), "lora_path", "values"),
    ("fields", lambda: filled(b"{", b'"a":1,'), None, "65536 members"),
    ("unknown", lambda: filled(b'{"zzz":{"y":[[', b'"",'), "zzz", "65536 values"),
    ("escaped name", lambda: filled(b'{"\\u0061":[', b"1,"), "a", "65536 values"),
    ("depth", lambda: filled(b'{"a":', b"["), None, "nested"),
    ("depth of objects", lambda: filled(b"", b'{"a":'), None, "nested"),
    ("closed", lambda: filled(b'{"a":1}', b"}"), None, "JSON"),
    ("floats", lambda: filled(b'{"logit_bias":[', b"1e308,"), "logit_bias", "exponent"),
    ("more floats", lambda: filled(b'{"logit_bias":[', b"1.5E+99,"), "logit_bias", "exponent"),
    ("string", lambda: filled(b'{"prompt":"', b"a", b'"}'), None, "string"),
    ("escapes", lambda: filled(b'{"prompt":"', b"\\\\", b'"}'), None, "string"),
    ("key", lambda: filled(b'{"', b"a", b'":1}'), None, "string"),
    ("integer", lambda: filled(b'{"seed":', b"1", b"}"), None, "number"),
    ("float", lambda: filled(b'{"top_p":0.', b"1", b"}"), None, "number"),
    ("white space", lambda: filled(b'{"top_p":', b" ", b"1}"), None, "white space"),
    ("words", lambda: filled(b'{"top_p":', b"true ", b"}"), None, "number"),
]


@pytest.mark.parametrize(("body", "field", "says"), [one[1:] for one in HOSTILE], ids=[one[0] for one in HOSTILE])
def test_a_hostile_body_is_refused_by_its_scan(body: Callable[[], bytes], field: str | None, says: str) -> None:
    scan = ShapeScan()
    with pytest.raises(InvalidRequest, match=says) as refusal:
        scan.feed(body())
    if field is not None:
        assert refusal.value.param == field
        assert refusal.value.message.startswith(f"{field}: ")
    assert scan.values <= shape.MAX_VALUES + shape.STEP
    assert scan.containers <= shape.MAX_CONTAINERS + shape.STEP
    if "string" not in says:
        assert scan.scanned < LARGE // 8


IDS = [random.Random(1).randrange(128_000) for _ in range(1 << 17)]
LEGIT = {
    "eight long prompts": {"input_ids": [IDS] * 8},
    "one long prompt": {"prompt": IDS * 8},
    "prompts": {"prompt": ["some, [text] {here}: " * 100] * 256},
    "many prompts": {"input_ids": [[1, 2, 3]] * 4096, "sampling_params": [{"temperature": 0.5, "n": 1}] * 4096},
    "chat": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a, b" * 50}]}] * 2000},
    "a long text": {"text": 'a,b [c] {d}: "e" \\ 1e300 \n é' * 250_000},
    "biases": {"prompt": "a", "logit_bias": {str(token): -1e-05 for token in range(20_000)}},
}


@pytest.mark.parametrize("name", LEGIT)
def test_a_large_body_of_a_usual_shape_is_accepted(name: str) -> None:
    body = json.dumps(LEGIT[name], ensure_ascii=name == "chat").encode()
    scan = ShapeScan()
    scan.feed(body)
    decoded, sizes = in_slices(bytearray(body), scan)
    assert decoded == LEGIT[name]
    assert max(sizes) <= (strings.MAX_STRING if "text" in name else slices.SLICE)


def in_slices(body: bytearray, scan: ShapeScan) -> tuple[object, list[int]]:
    """Returns the decoded body and the sizes of the slices."""
    decoded: list[object] = []

    def work() -> slices.Slices[None]:
        decoded.append((yield from slices.decode(body, scan.marks)))

    sizes = [*work()]
    return decoded[0], sizes


def test_whatever_a_body_holds_it_is_bounded() -> None:
    rng = random.Random(3)
    items = [
        b"[]",
        b"{}",
        b'{"a":1}',
        b"1",
        b"-1.5e10",
        b"1e300",
        b'"a"',
        b'"\\u0041"',
        b"[[1],[2]]",
        b"null",
        b'"\xc3\xa9"',
    ]
    accepted = 0
    for _ in range(40):
        fields = []
        for name in rng.sample(["prompt", "input_ids", "stop", "x", "logit_bias"], rng.randrange(1, 4)):
            part = b",".join(rng.choices(items, k=rng.randrange(1, 4)))
            fields.append(f'"{name}":['.encode() + b",".join([part] * rng.choice([1, 300, 20_000, 90_000])) + b"]")
        body = b"{" + b",".join(fields) + b"}"
        scan = ShapeScan()
        try:
            scan.feed(body)
        except InvalidRequest:
            continue
        accepted += 1
        assert scan.values <= shape.MAX_VALUES
        assert scan.containers <= shape.MAX_CONTAINERS
        sizes = [*slices.decode(bytearray(body), scan.marks)]
        assert max(sizes) <= slices.SLICE
        assert _objects(msgspec.json.decode(body)) <= scan.values + scan.members + 1
    assert 5 < accepted < 35


def _objects(value: object) -> int:
    """Returns the number of values in `value`, itself included, and of keys."""
    if isinstance(value, dict):
        return 1 + sum(1 + _objects(one) for one in value.values())
    return 1 + sum(map(_objects, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64 << 10])
def test_the_size_of_pieces_makes_no_difference(size: int) -> None:
    body = json.dumps({"a\\": '\\"[,]\\\\', 'b"': [1, {"c": "]"}, [[]]], "d": [1e-5, "\\\\\\"]}).encode()
    whole, pieces, arrived = ShapeScan(), ShapeScan(), bytearray()
    whole.feed(body)
    for at in range(0, len(body), size):
        arrived += body[at : at + size]
        pieces.feed(arrived)
    for one, other in zip(whole.marks, pieces.marks, strict=True):
        assert one.tolist() == other.tolist()
    assert (whole.values, whole.members) == (pieces.values, pieces.members)
