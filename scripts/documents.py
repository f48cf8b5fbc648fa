"""Writes the README's table of what is served, families by formats, from the code's own registries.

python scripts/documents.py            rewrites the table in README.md
python scripts/documents.py --check    exit status 1 where it is not current
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_runner.config import FAMILIES
from model_runner.lora.peft.config import REFUSED, VARIANTS
from model_runner.lora.peft.tensor_mapping import FORMATS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- support: written by scripts/documents.py -->", "<!-- end of support -->"


def table() -> str:
    """The table and what stands under it, as Markdown."""
    columns = [*(form.name for form in FORMATS.values()), *VARIANTS]
    lines = ["| family | " + " | ".join(columns) + " | |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {family.title} |" + " yes |" * len(columns) + f" {family.note} |" for family in FAMILIES.values()]
    lines += ["", "Each becomes, exactly:", ""]
    lines += [f"- {form.name}: {form.note}" for form in FORMATS.values()]
    lines += [f"- {name}: {note}" for name, note in VARIANTS.items()]
    refused = ", ".join(f"`{option}` ({what})" for option, what in REFUSED.items())
    return "\n".join([*lines, "", f"Refused by name at load: {refused}; any option and any tensor that is not known."])


def main(arguments: list[str] | None = None) -> int:
    """Rewrites or checks; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(arguments).check
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{README.name} has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    current = f"{before}{begin}\n\n{table()}\n\n{end}{after}"
    if current == text:
        return 0
    if check:
        print(f"{README.name} is not current: run python scripts/documents.py", file=sys.stderr)
        return 1
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
