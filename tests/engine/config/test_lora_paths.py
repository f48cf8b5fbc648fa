"""The forms of --lora-paths items, and the errors of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.lora_paths import AdapterSpec, adapter_specs, parse_adapter
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("item", "spec"),
    [
        ("adapters/sql", AdapterSpec(name="adapters/sql", path="adapters/sql")),
        ("sql=adapters/sql", AdapterSpec(name="sql", path="adapters/sql")),
        ("sql=a=b", AdapterSpec(name="sql", path="a=b")),
        ("org/name@rev", AdapterSpec(name="org/name@rev", path="org/name@rev")),
        ('{"lora_name": "s", "lora_path": "p"}', AdapterSpec(name="s", path="p")),
        ('{"lora_name": "s", "lora_path": "p", "pinned": true}', AdapterSpec(name="s", path="p", pinned=True)),
        ('{"name": "s", "path": "p"}', AdapterSpec(name="s", path="p")),
        ('{"name": "s", "path": "p", "base_model_name": "b"}', AdapterSpec(name="s", path="p", base="b")),
    ],
)
def test_item_is_parsed_in_each_form(item: str, spec: AdapterSpec) -> None:
    assert parse_adapter(item) == spec


def test_directory_name_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "r=8").mkdir()
    item = str(tmp_path / "r=8")
    assert parse_adapter(item) == AdapterSpec(name=item, path=item)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("=path", "must not be empty"),
        ("name=", "must not be empty"),
        ("{oops", "malformed"),
        ('{"lora_name": "s"}', "lora_path"),
        ('{"name": "s", "path": "p", "rank": 3}', "rank"),
        ('{"lora_name": "s", "lora_path": 3}', "Expected `str`"),
        ('{"lora_name": "s", "lora_path": "p", "pinned": "yes"}', "Expected `bool`"),
        ('{"lora_name": "", "lora_path": "p"}', "must not be empty"),
    ],
)
def test_bad_item_is_quoted_in_the_error(item: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_adapter(item)
    assert words in caught.value.message
    assert item in caught.value.message


def test_adapter_names_differ_from_each_other_and_the_base() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        adapter_specs(ServerArgs(model_path="m", lora_paths=["a=x", "a=y"]))
    with pytest.raises(ConfigError, match="base model's"):
        adapter_specs(ServerArgs(model_path="m", served_model_name=["a"], lora_paths=["a=x"]))
    for name in ("a:sql", "a:"):
        with pytest.raises(ConfigError, match=f"the name {name} means the adapter"):
            adapter_specs(ServerArgs(model_path="m", served_model_name=["a"], lora_paths=[f"{name}=x"]))
    assert adapter_specs(ServerArgs(model_path="m", lora_paths=["a:sql=x"]))[0].name == "a:sql"


def test_pinned_adapters_leave_one_lane_free() -> None:
    items = [f'{{"lora_name": "a{number}", "lora_path": "p", "pinned": true}}' for number in range(2)]
    assert len(adapter_specs(ServerArgs(model_path="m", lora_paths=items, max_loras_per_batch=3))) == 2
    with pytest.raises(ConfigError, match="2 adapters are pinned"):
        adapter_specs(ServerArgs(model_path="m", lora_paths=items, max_loras_per_batch=2))
