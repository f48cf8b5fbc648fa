"""The README's table of families and formats is what the registries say."""

from __future__ import annotations

import support_table

from model_runner.arch import FAMILIES
from model_runner.lora.formats.landing import FORMATS


def test_the_readme_is_current() -> None:
    assert support_table.main(["--check"]) == 0, "run python scripts/support_table.py"


def test_every_family_and_format_is_in_it() -> None:
    rows = support_table.table().splitlines()
    for form in FORMATS.values():
        assert f" {form.name} |" in rows[0]
    for family in FAMILIES.values():
        assert sum(row.startswith(f"| {family.title} |") for row in rows) == 1
