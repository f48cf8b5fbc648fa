"""Documents: the front page is short, links and named files exist, every page is reached, JSON blocks are JSON."""

from __future__ import annotations

import json
import posixpath
import re

import pytest
from fixtures.documents.pages import FOLDERS, ROOT, anchors, blocks, code_words, links, pages

PAGES = pages()
PACKAGES = ("engine", "tokenizer_proc", "scheduler", "model_runner")
FRONT_PAGE_BYTES = 10_000


def resolve(page: str, target: str) -> tuple[str, str]:
    """Returns the path that a link refers to, relative to the root, and its anchor."""
    path, _, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page, anchor


def missing_links(page: str) -> list[str]:
    missing = []
    for target in links(page):
        path, anchor = resolve(page, target)
        if not (ROOT / path).exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    return missing


def names_a_file(word: str) -> bool:
    return word.split("/")[0] in FOLDERS and "/" in word and not re.search(r"[*<{]", word)


def names_a_module(word: str) -> bool:
    return word.split(".")[0] in PACKAGES and re.fullmatch(r"[a-z_]+(\.\w+)+", word) is not None


def is_module(word: str) -> bool:
    """Returns whether a dotted name, or all but its last part (a class, a function), is a module or a package."""
    whole = ROOT.joinpath(*word.split("."))
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in (whole, whole.parent))


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= FRONT_PAGE_BYTES


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    assert missing_links(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_documents_exist(page: str) -> None:
    words = code_words(page)
    assert [word for word in words if names_a_file(word) and not (ROOT / word).exists()] == []
    assert [word for word in words if names_a_module(word) and not is_module(word)] == []


def test_pages_are_reached_from_the_front_page() -> None:
    reached, todo = {"README.md"}, ["README.md"]
    while todo:
        page = todo.pop()
        for path in {resolve(page, target)[0] for target in links(page)} - reached:
            if path.endswith(".md"):
                reached.add(path)
                todo.append(path)
    assert sorted(set(PAGES) - reached) == []


def test_packages_have_a_readme_with_a_glossary() -> None:
    for package in PACKAGES:
        assert "glossary" in anchors(f"{package}/README.md")


def test_json_blocks_are_json() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language == "json"]
    assert found
    for block in found:
        json.loads(block.text)


def test_links_to_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "[a](nothing.md) [b](#nowhere) [c](README.md#glossary) `engine/no_such_file.py` `engine.no_such.Thing`"
    monkeypatch.setattr("fixtures.documents.pages.read", lambda name: page if name == "new.md" else "## Glossary")
    assert missing_links("new.md") == ["nothing.md", "#nowhere"]
    words = code_words("new.md")
    assert [word for word in words if names_a_file(word)] == ["engine/no_such_file.py"]
    assert [word for word in words if names_a_module(word) and not is_module(word)] == ["engine.no_such.Thing"]
