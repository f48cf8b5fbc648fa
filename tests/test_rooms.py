"""The shape of the tree: folders stay small, every package folder has its layer contract, file names are nouns."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "tokenizer_proc", "scheduler", "model_runner")
NOT_COUNTED = {"__init__.py", "__main__.py", "conftest.py"}

MOST_MODULES = 9
LONGEST_TEST_NAME = 60
MOST_MODULES_OF_ONE_KIND = 12
OF_ONE_KIND = {  # folder: what each of its modules is
    "model_runner/compute/kernels/triton": "a triton kernel",
    "model_runner/compute/kernels/triton/lora": "a triton kernel",
    "model_runner/config/families": "a model family",
    "model_runner/lora/backends": "a LoRA backend, or the tables that several of them read",
    "model_runner/lora/formats": "a PEFT format",
    "scripts": "a script that is run by name",
    "scripts/attacks/kinds": "a group of kinds of attack",
    "tokenizer_proc/http/routes": "a group of HTTP routes",
}

TOP_LEVEL = {*PACKAGES, "tests", "scripts", "pyproject.toml", "README.md", "LICENSE", "build", "dist"}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


@cache
def modules() -> list[PurePosixPath]:
    """Returns every Python file of the project, relative to its root."""
    return [
        PurePosixPath(path.relative_to(ROOT).as_posix())
        for top in (*PACKAGES, "tests", "scripts")
        for path in sorted((ROOT / top).rglob("*.py"))
    ]


def most_modules(folder: str) -> int:
    return MOST_MODULES_OF_ONE_KIND if folder in OF_ONE_KIND else MOST_MODULES


def test_top_level_holds_the_rooms_alone() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix != ".egg-info"}
    assert names - TOP_LEVEL == set()


def test_folders_hold_at_most_nine_modules() -> None:
    counts = Counter(str(path.parent) for path in modules() if path.name not in NOT_COUNTED)
    assert len(counts) > 50
    too_large = [
        f"{folder}: {count} modules, at most {most_modules(folder)}: move some into a sub-folder, "
        "or name the kind that all of them are in OF_ONE_KIND"
        for folder, count in sorted(counts.items())
        if count > most_modules(folder)
    ]
    assert not too_large, "\n".join(too_large)


def test_folders_of_one_kind_exist() -> None:
    assert [folder for folder in OF_ONE_KIND if not (ROOT / folder).is_dir()] == []


def test_package_folders_have_exhaustive_layer_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    exhaustive = {
        container
        for contract in contracts
        if contract["type"] == "layers" and contract.get("exhaustive")
        for container in contract["containers"]
    }
    folders = {path.parent for path in modules() if path.parts[0] in PACKAGES}
    with_sub_folders = {".".join(above.parts) for folder in folders for above in folder.parents if above.parts}
    assert with_sub_folders >= set(PACKAGES)
    missing = sorted(with_sub_folders - exhaustive)
    assert not missing, f"pyproject.toml: no exhaustive layers contract for {', '.join(missing)}"


def test_file_names_are_nouns_that_say_something() -> None:
    vague = [str(path) for path in modules() if path.stem.removeprefix("test_") in FORBIDDEN_NAMES]
    assert not vague, f"a name that says nothing: {', '.join(vague)}"


def test_test_names_fit_in_sixty_characters() -> None:
    names = [
        node.name
        for path in modules()
        if path.parts[0] == "tests" and path.name.startswith("test_")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 1000
    assert [name for name in names if len(name) > LONGEST_TEST_NAME] == []
