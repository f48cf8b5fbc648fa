"""Writes the generated parts of the documents: flags, HTTP calls, metrics, model families and adapter formats.

python scripts/documents.py            rewrites the parts that changed
python scripts/documents.py --check    changes nothing; exit status 1 if a part is stale

A part is the text between `<!-- begin NAME: ... -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tables.flags import flags  # noqa: E402
from tables.formats import families, formats  # noqa: E402
from tables.http_calls import http_calls  # noqa: E402
from tables.metrics import metrics  # noqa: E402

PARTS: dict[str, dict[str, Callable[[], str]]] = {  # page: part: the function that writes the part
    "engine/FLAGS.md": {"flags": flags},
    "tokenizer_proc/README.md": {"calls": http_calls},
    "tokenizer_proc/METRICS.md": {"metrics": metrics},
    "model_runner/FORMATS.md": {"families": families, "formats": formats},
}


def current(page: str, text: str) -> str:
    """Returns the text of `page` with its generated parts as the code would write them now."""
    for name, write in PARTS[page].items():
        begin, end = f"<!-- begin {name}: written by scripts/documents.py -->", f"<!-- end {name} -->"
        parts = re.fullmatch(f"(.*{re.escape(begin)}\n).*(\n{re.escape(end)}.*)", text, re.DOTALL)
        if parts is None:
            raise ValueError(f"{page} has no {begin} ... {end}")
        text = f"{parts[1]}\n{write()}\n{parts[2]}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Rewrites or checks the generated parts. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in PARTS:
        path = ROOT / page
        text = path.read_text()
        new = current(page, text)
        if new == text:
            continue
        stale += 1
        if check:
            print(f"{page} is stale: run python scripts/documents.py", file=sys.stderr)
        else:
            path.write_text(new)
            print(f"wrote {page}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
