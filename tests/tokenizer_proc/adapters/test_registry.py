"""Adapter names: what `model` and `lora_path` select, held entries, and cards."""

from __future__ import annotations

import msgspec
import pytest

from engine.config.process_configs import AdapterSource
from engine.errors import AdapterError, InvalidRequest, NotFound
from engine.messages import AdapterState, Footprint, LoadAdapter
from tokenizer_proc.adapters.registry import AdapterRegistry


def registry(*names: str, bases: tuple[str, ...] = ("org/base", "b")) -> AdapterRegistry:
    return AdapterRegistry(
        bases,
        [
            AdapterSource(adapter_id=number, name=name, path=f"given/{name}", root=f"/real/{name}")
            for number, name in enumerate(names, start=1)
        ],
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, None),
        ("org/base", None),
        ("b", None),
        ("sql", "sql"),
        ("b:sql", "sql"),
        ("org/base:sql", "sql"),
        ("b:org/x:y", "org/x:y"),
        ("org/x:y", "org/x:y"),
        ("x:sql", "x:sql"),
    ],
)
def test_model_names_an_adapter_or_the_base(model: str | None, expected: str | None) -> None:
    assert registry("sql", "org/x:y", "x:sql").select(model) == expected


@pytest.mark.parametrize("others", [(), ("c:sql",), ("poet",)])
def test_a_name_means_the_same_whatever_is_loaded(others: tuple[str, ...]) -> None:
    names = registry("sql", *others, bases=("b", "b:c"))
    assert names.select("b:sql") == "sql"
    assert names.select("b:c:sql") == "sql"
    assert names.select("b:c") is None
    assert names.meaning("b:poet") == "poet"
    assert names.meaning("c:sql") == "c:sql"


@pytest.mark.parametrize("model", ["nope", "x:sql", "b:", "b:nope", "", " sql"])
def test_unknown_models_are_not_found(model: str) -> None:
    with pytest.raises(NotFound, match=r"The model `.*` does not exist\.") as refusal:
        registry("sql").select(model)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_lora_path() -> None:
    names = registry("sql", "poet")
    assert names.select(None, "sql") == "sql"
    assert names.select("b", {"sql": 0.5, "poet": 0.5}) == {"sql": 0.5, "poet": 0.5}
    assert names.select("sql", "sql") == "sql"
    assert names.select("b:sql", {"sql": 1.0}) == "sql"
    with pytest.raises(InvalidRequest, match=r"`sql`.*`poet`"):
        names.select("sql", "poet")
    with pytest.raises(InvalidRequest, match=r"`sql`.*`sql` \+ `poet`"):
        names.select("sql", {"sql": 1.0, "poet": 1.0})
    with pytest.raises(NotFound, match="`nope`") as refusal:
        names.select(None, "nope")
    assert refusal.value.param == "lora_path"
    for bad in ({}, {"sql": float("nan")}):
        with pytest.raises(InvalidRequest):
            names.select(None, bad)


def test_resolving_gives_ids_and_scales() -> None:
    names = registry("sql", "poet")
    assert names.resolve(None).lora == []
    assert names.resolve("poet").lora == [(2, 1.0)]
    assert names.resolve({"poet": 0.25, "sql": -1.0}).lora == [(2, 0.25), (1, -1.0)]


def test_held_adapters_count_their_requests() -> None:
    names = registry("sql", "poet")
    with names.resolve({"sql": 1.0, "poet": 1.0}).held(3), names.resolve("sql").held():
        assert [card.running for card in names.cards()] == [4, 3]
    assert [card.running for card in names.cards()] == [0, 0]


def test_states_make_it_ready_or_failed() -> None:
    names = registry("sql", "poet")
    sent: list[LoadAdapter] = []
    names.load(sent.append)
    assert [(load.adapter_id, load.path) for load in sent] == [(1, "/real/sql"), (2, "/real/poet")]
    names.handle(AdapterState(adapter_id=1, state="host", revision="r", lora_rank=8))
    assert not names.is_ready
    assert names.failure is None
    names.handle(AdapterState(adapter_id=2, state="failed", error="rank 4096"))
    assert "`poet`: rank 4096" in str(names.failure)
    assert [("`poet`: rank 4096" in reason) for reason in names.accept_failed()] == [True]
    assert names.is_ready
    with pytest.raises(AdapterError, match="`poet`: rank 4096"):
        names.resolve("poet").check(8)
    names.handle(AdapterState(adapter_id=2, state="resident"))
    assert names.is_ready
    names.handle(AdapterState(adapter_id=77, state="host"))  # an unknown adapter's state is logged and dropped


def test_cards_show_path_parent_and_state() -> None:
    names = registry("sql")
    found = AdapterState(adapter_id=1, state="resident", revision="r", lora_rank=8, target_modules=["q_proj"], bytes=5)
    names.handle(msgspec.structs.replace(found, notes=["a note"]))
    card = names.card("sql")
    assert card is not None
    assert (card.path, card.root, card.parent, card.state) == ("given/sql", "/real/sql", "org/base", "resident")
    assert (card.revision, card.lora_rank, card.target_modules, card.bytes) == ("r", 8, ["q_proj"], 5)
    assert card.notes == ["a note"]
    assert names.card("nope") is None
    told = AdapterRegistry(["b"], [AdapterSource(adapter_id=1, name="a", path="p", root="r", base="theirs")])
    assert told.cards()[0].parent == "theirs"


def test_an_adapter_that_is_gone_is_forgotten() -> None:
    names = registry("sql", "poet")
    held = names.resolve("sql")
    names.handle(AdapterState(adapter_id=1, state="gone"))
    assert [card.name for card in names.cards()] == ["poet"]
    assert held.lora == [(1, 1.0)]
    with pytest.raises(NotFound):
        names.resolve("sql")


def test_pages_of_a_mix_add_up() -> None:
    names = registry("sql", "poet")
    names.handle(AdapterState(adapter_id=1, state="host", footprint=Footprint({"qkv": 1, "o": 2})))
    names.handle(AdapterState(adapter_id=2, state="host", footprint=Footprint({"qkv": 3})))
    assert names.resolve({"sql": 1.0, "poet": 0.1}).pages == {"qkv": 4, "o": 2}
    assert msgspec.json.encode(names.cards())


def test_failed_adapter_is_not_asked_for_again() -> None:
    """When a runner or a scheduler starts, all adapters except failed ones are loaded again."""
    names, asked = registry("sql", "poet"), list[int]()
    names.handle(AdapterState(adapter_id=1, state="host", revision="r"))
    names.handle(AdapterState(adapter_id=1, state="failed", revision="r", error="it is set aside"))
    names.load(lambda message: asked.append(message.adapter_id))
    assert asked == [2]
