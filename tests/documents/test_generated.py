"""The generated parts of the documents match the code."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import documents
from tables.flags import default_of, flags, is_shown
from tables.formats import families, formats
from tables.http_calls import application, http_calls

from engine.config.flags.parser import make_parser
from engine.config.server_args import ServerArgs
from model_runner.config import FAMILIES
from model_runner.lora.formats import registry

FLAGS = [action for action in make_parser()._actions if is_shown(action)]


def first_cells(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]


def test_generated_parts_are_current() -> None:
    assert documents.main(["--check"]) == 0, "run python scripts/documents.py"


def test_stale_parts_fail_and_are_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n<!-- begin part: written by scripts/documents.py -->\nold\n<!-- end part -->\nb\n"
    (tmp_path / "PAGE.md").write_text(text)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(documents, "PARTS", {"PAGE.md": {"part": lambda: "new"}})
    assert documents.main(["--check"]) == 1
    assert (tmp_path / "PAGE.md").read_text() == text
    assert documents.main([]) == 0
    assert documents.main(["--check"]) == 0
    assert (tmp_path / "PAGE.md").read_text() == text.replace("\nold\n", "\n\nnew\n\n")


def test_pages_without_markers_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("engine/FLAGS.md has no <!-- begin flags")):
        documents.current("engine/FLAGS.md", "nothing")


def test_families_and_formats_have_a_row_each() -> None:
    assert first_cells(families())[2:] == [family.title for family in FAMILIES.values()]
    assert {form.name for form in registry.all_formats()} <= set(first_cells(formats()))


def test_flags_have_a_row_each_and_no_other() -> None:
    listed = {name for cell in first_cells(flags()) for name in re.findall(r"`(--[a-z-]+)`", cell)}
    options = {option for action in make_parser()._actions for option in action.option_strings}
    assert listed == options - {"-h", "--help"}


@pytest.mark.parametrize("action", FLAGS, ids=[action.option_strings[0] for action in FLAGS])
def test_help_texts_tell_the_default_of_args(action: argparse.Action) -> None:
    told = default_of(action)
    default = next(field.default for field in msgspec.structs.fields(ServerArgs) if field.encode_name == action.dest)
    if isinstance(default, bool):
        is_negative = isinstance(action, argparse._StoreFalseAction)
        assert told == ("on" if default is not is_negative else "off")
    elif isinstance(default, (int, float, str)) and not isinstance(action, argparse._StoreConstAction):
        assert told == f"{default:g}" if isinstance(default, float) else told == str(default)


def test_calls_have_a_row_each() -> None:
    listed = re.findall(r"`([A-Z]+ /[^`]*)`", "\n".join(first_cells(http_calls())))
    routes = [(route.method, route.resource) for route in application().router.routes() if route.method != "HEAD"]
    assert sorted(listed) == sorted(f"{method} {resource.canonical}" for method, resource in routes if resource)
