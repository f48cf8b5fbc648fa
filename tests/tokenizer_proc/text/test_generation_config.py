"""The defaults that are read from generation_config.json, and the end ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.directory import Directory
from engine.errors import ConfigError
from tokenizer_proc.text.generation_config import GenerationConfig


def write(directory: Path, name: str, **fields: object) -> None:
    (directory / name).write_text(json.dumps(fields))


def test_values_are_neutral_without_files(tmp_path: Path) -> None:
    assert GenerationConfig.load(tmp_path) == GenerationConfig()


def test_values_of_the_file_are_defaults(tmp_path: Path) -> None:
    write(
        tmp_path,
        "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.05,
        eos_token_id=[7, 8],
        transformers_version="4.0",
    )
    write(tmp_path, "config.json", eos_token_id=8, hidden_size=4)
    assert GenerationConfig.load(tmp_path, eos_id=2) == GenerationConfig(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, end_ids=[7, 8, 2]
    )


def test_do_sample_false_is_greedy_and_the_default_samples(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", do_sample=False, temperature=0.6)
    assert GenerationConfig.load(tmp_path).temperature == 0.0
    write(tmp_path, "generation_config.json", eos_token_id=1)
    assert GenerationConfig.load(tmp_path) == GenerationConfig(end_ids=[1])


def test_bad_values_name_the_file_and_the_field(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", temperature="warm")
    with pytest.raises(ConfigError, match=r"generation_config\.json.*temperature"):
        GenerationConfig.load(tmp_path)


NONSENSE: list[tuple[str, object, str]] = [
    ("temperature", -5, "temperature = -5.0 is not from 0 to 1000"),
    ("temperature", 1e300, "temperature"),
    ("top_p", 7, "top_p = 7.0 is not from 0 to 1"),
    ("top_p", -0.1, "top_p"),
    ("top_k", "x", r"cannot be read.*top_k"),
    ("top_k", -2, "top_k = -2 is not from -1"),
    ("min_p", 1.5, "min_p"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("eos_token_id", ["a"], r"cannot be read.*eos_token_id"),
]


@pytest.mark.parametrize(("name", "value", "said"), NONSENSE)
def test_a_value_that_no_request_may_have_is_refused(name: str, value: object, said: str, tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", **{name: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json.*{said}"):
        GenerationConfig.load(tmp_path)
    with Directory(tmp_path) as directory, pytest.raises(ConfigError, match=rf"generation_config\.json.*{said}"):
        GenerationConfig().over(directory, [], None, 300)


@pytest.mark.parametrize("token", [-1, 300])
def test_an_end_id_outside_of_the_vocabulary_is_refused(token: int, tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", eos_token_id=[5, token])
    said = f"eos_token_id = {token} is not in the vocabulary of 300 tokens"
    with Directory(tmp_path) as directory, pytest.raises(ConfigError, match=said):
        GenerationConfig().over(directory, [], None, 300)


def test_a_huge_file_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", eos_token_id=[1] * 100_000)
    with pytest.raises(ConfigError, match="more than"):
        GenerationConfig.load(tmp_path)


def test_end_ids_of_a_nested_text_config_are_read(tmp_path: Path) -> None:
    write(tmp_path, "config.json", text_config={"eos_token_id": [5, 6]})
    assert GenerationConfig.load(tmp_path).end_ids == [5, 6]
