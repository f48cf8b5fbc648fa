"""Every flag, field and path that a message names exists, so that its advice can be followed. Read from the sources."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import msgspec
import pytest

from engine.config.flags.parser import NOT_YET_AVAILABLE, REFUSED, make_parser
from engine.messages import Command, SamplingParams, Submit
from tokenizer_proc.http import routes
from tokenizer_proc.http.app import ROUTES
from tokenizer_proc.http.bodies import fields, neutral

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "tokenizer_proc", "scheduler", "model_runner")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
PATH = re.compile(r"(?:(?<=\s)|^|(?<=[`'(]))(/[a-z0-9_]+(?:/[a-z0-9_]+)*)(?=[\s`',.:)]|$)")
QUOTED = re.compile(r"[`']([a-z_][a-z0-9_]*)[`']")
ADD = ("add_argument", "add")
"""The functions by which a module adds a flag to its parser."""
NO_FIELDS = {"default"}
"""Quoted words of the tokenizer process's messages that are no fields: the name of a chat template."""


@functools.cache
def texts(tree: ast.AST) -> tuple[str, ...]:
    """Returns the texts of a module, also the parts of formatted ones, but not its docstrings."""
    nodes = [*ast.walk(tree)]
    bodies = [node.body for node in nodes if isinstance(getattr(node, "body", None), list)]
    documents = {id(one.value) for body in bodies for one in body if isinstance(one, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in documents]
    return tuple(node.value for node in constants if isinstance(node.value, str))


def flags_in(tree: ast.AST) -> set[str]:
    return {flag for text in texts(tree) for flag in FLAG.findall(text)}


def paths_in(tree: ast.AST) -> set[str]:
    return {path for text in texts(tree) if " " in text for path in PATH.findall(text)}


def params_in(tree: ast.AST) -> set[str]:
    """Returns the fields that errors are about: the texts in their argument `param`, without indices and prefixes."""
    given = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "param"]
    words = {text for value in given for text in texts(value)}
    return {name for word in words for name in re.findall(r"[a-z_][a-z0-9_]*", word)}


def quoted_in(tree: ast.AST) -> set[str]:
    return {name for text in texts(tree) if " " in text for name in QUOTED.findall(text)}


def known_flags() -> set[str]:
    """Returns the server's flags, and those of the commands that the packages have beside it."""
    parser = make_parser()
    found = {flag for action in parser._actions for flag in action.option_strings}
    for path in SOURCES:
        if "argparse" in path.read_text():
            calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
            added = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in ADD]
            found |= {text for call in added for text in texts(call) if text.startswith("--")}
    return found | {"--embedded"}  # the library's own argument of engine.launch


def known_fields() -> set[str]:
    """Returns the fields of all bodies, at every depth, and of the messages that hosts send."""
    found = {*fields.SPELLINGS_OPENAI, *fields.SPELLINGS_NATIVE, "config_format"}  # the last is in a query
    structs: list[type[msgspec.Struct]] = [Submit, Command, SamplingParams]
    for module in pkgutil.iter_modules(routes.__path__):
        loaded = importlib.import_module(f"{routes.__name__}.{module.name}")
        structs += [one for _, one in inspect.getmembers(loaded, inspect.isclass)
                    if issubclass(one, msgspec.Struct) and one.__name__.endswith("Body")]  # fmt: skip
    return found.union(*map(neutral.nested_names, structs))


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def test_every_flag_in_a_message_exists() -> None:
    known = known_flags()
    unknown = {(str(path.relative_to(ROOT)), flag) for path in SOURCES for flag in flags_in(parsed(path)) - known}
    assert not unknown


def test_no_message_advises_a_refused_flag() -> None:
    refused = {*REFUSED, *NOT_YET_AVAILABLE}
    elsewhere = [path for path in SOURCES if path.parts[-3:-1] != ("config", "flags")]
    assert not {(path.name, flag) for path in elsewhere for flag in flags_in(parsed(path)) & refused}


def test_every_path_in_a_message_exists() -> None:
    known = {route.path.split("/{")[0] for route in ROUTES}
    found = {(str(path.relative_to(ROOT)), one) for path in SOURCES for one in paths_in(parsed(path))}
    assert found
    assert {(source, one) for source, one in found if one not in known} == set()


def test_every_field_that_an_error_is_about_exists() -> None:
    known = known_fields()
    sources = [path for path in SOURCES if path.parts[len(ROOT.parts)] in ("engine", "tokenizer_proc")]
    found = {(str(path.relative_to(ROOT)), one) for path in sources for one in params_in(parsed(path))}
    assert len(found) > 50
    assert {(source, one) for source, one in found if one not in known} == set()


def test_every_field_that_a_message_quotes_exists() -> None:
    known = known_fields() | NO_FIELDS
    sources = [path for path in SOURCES if path.parts[len(ROOT.parts)] == "tokenizer_proc"]
    found = {(str(path.relative_to(ROOT)), one) for path in sources for one in quoted_in(parsed(path))}
    assert {(source, one) for source, one in found if one not in known} == set()


def test_fields_that_reasons_advise_exist() -> None:
    words = {word for reason in fields.REASONS.values() for word in re.findall(r"[a-z]+_[a-z_]+", reason)}
    assert words - known_fields() == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""See --nothing."""\nraise X(f"set --no-such {y}")', ({"--no-such"}, set(), set())),
        ('raise X("ask /v1/nowhere, or `not_there`", param=f"{at}.nothing[0]")', (set(), {"/v1/nowhere"}, {"nothing"})),
    ],
)
def test_the_scan_finds_what_does_not_exist(source: str, expected: tuple[set[str], set[str], set[str]]) -> None:
    tree = ast.parse(source)
    assert (flags_in(tree), paths_in(tree), params_in(tree)) == expected
    assert isinstance(make_parser(), argparse.ArgumentParser)
