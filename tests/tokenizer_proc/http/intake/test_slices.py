"""A body that is scanned in steps and decoded in slices gives what msgspec gives, and is refused where msgspec does."""

from __future__ import annotations

import json
import random

import msgspec
import pytest

from engine.errors import InvalidRequest
from tokenizer_proc.http.intake import shape, slices
from tokenizer_proc.http.intake.shape import ShapeScan

WORDS = ["a", "", "é", "\\", '"', "\\\\", '\\"', "[", "],[", "{", ":", ",", "e5", "\n", "😀", "x" * 9]
JUNK = b'[]{},:"\\ 1e-.tn\x00\xff'


def in_slices(body: bytes) -> tuple[object, list[int]]:
    """Returns the decoded body and the sizes of the slices."""
    scan = ShapeScan()
    scan.feed(body)
    work, sizes = slices.decode(bytearray(body), scan.marks), []
    while True:
        try:
            sizes.append(next(work))
        except StopIteration as end:
            return end.value, sizes


def at_once(body: bytes) -> object:
    return msgspec.json.decode(body)


def outcome(decode: object, body: bytes) -> object:
    try:
        return decode(body)  # type: ignore[operator]
    except (msgspec.DecodeError, UnicodeDecodeError, InvalidRequest):
        return "refused"


def document(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(8 if depth < 4 else 4)
    if kind < 2:
        return rng.choice([0, -1, 1.5, 1e-7, 128_000, True, False, None])
    if kind < 4:
        return "".join(rng.choices(WORDS, k=rng.randrange(6)))
    if kind < 6:
        return [document(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {"".join(rng.choices(WORDS, k=2)): document(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "STEP", 13)
    monkeypatch.setattr(slices, "SLICE", 12)


@pytest.mark.usefixtures("tiny")
def test_slices_give_what_msgspec_gives() -> None:
    rng = random.Random(1)
    sliced = 0
    for _ in range(300):
        value = {"a": document(rng), "b": document(rng)}
        body = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
        found, sizes = in_slices(body)
        assert found == at_once(body) == value
        sliced += len(sizes) > 3
    assert sliced > 100


@pytest.mark.usefixtures("tiny")
def test_slices_refuse_what_msgspec_refuses() -> None:
    rng = random.Random(2)
    refused = 0
    for _ in range(1200):
        body = bytearray(json.dumps({"a": document(rng), "b": document(rng)}).encode())
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[at] = rng.choice(JUNK)
                case 1:
                    body.insert(at, rng.choice(JUNK))
                case _:
                    del body[at]
        expected = outcome(at_once, bytes(body))
        assert outcome(lambda data: in_slices(data)[0], bytes(body)) == expected, bytes(body)
        refused += expected == "refused"
    assert refused > 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"1," * 99 + b"]}",
        b'{"a":[,' + b"1," * 99 + b"1]}",
        b'{"a":[' + b"1," * 50 + b"," + b"1," * 50 + b"1]}",
        b'{"a":[' + b"1," * 99 + b"1}]",
        b'{"a":[' + b"1," * 99 + b"1]}}",
        b'{"a":[' + b"1," * 99 + b"1]} {}",
        b'{"a" [' + b"1," * 99 + b"1]}",
        b'{"a":[' + b"1," * 99 + b"1],}",
        b'{"a":1 [' + b"1," * 99 + b"1]}",
        b'{a:[' + b"1," * 99 + b"1]}",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tiny")
def test_cut_places_check_the_syntax(body: bytes) -> None:
    assert outcome(at_once, body) == outcome(lambda data: in_slices(data)[0], body) == "refused"


def test_no_slice_is_larger_than_the_bound() -> None:
    ids = [*range(100_000)]
    body = json.dumps({"prompt": [ids, ids], "x": {str(n): [n] for n in range(5000)}}, indent=1).encode()
    found, sizes = in_slices(body)
    assert found == at_once(body)
    assert max(sizes) <= slices.SLICE
    assert len(sizes) > len(body) // slices.SLICE


def test_a_key_that_comes_again_counts_last() -> None:
    body = b'{"a":[' + b"1," * 50_000 + b'1],"b":2,"a":[' + b"3," * 50_000 + b'3],"b":4}'
    assert in_slices(body)[0] == {"a": [3] * 50_001, "b": 4}
