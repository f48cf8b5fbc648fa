"""The README's table of families and formats is what the registries say."""

from __future__ import annotations

import documents

from model_runner.config import FAMILIES
from model_runner.lora.peft.tensor_mapping import FORMATS


def test_the_readme_is_current() -> None:
    assert documents.main(["--check"]) == 0, "run python scripts/documents.py"


def test_every_family_and_format_is_in_it() -> None:
    rows = documents.table().splitlines()
    for form in FORMATS.values():
        assert f" {form.name} |" in rows[0]
    for family in FAMILIES.values():
        assert sum(row.startswith(f"| {family.title} |") for row in rows) == 1
