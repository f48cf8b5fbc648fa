"""Downloads the peers' kernel files: gets wheels with pip, extracts a few files, deletes the wheels.

Needs a network. The extracted files are small enough to be copied to another machine; git ignores their folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu.columns import sglang as sglang_columns
from gpu.columns import vllm as vllm_column

PEERS = {"sglang==0.5.23": sglang_columns.FILES, "vllm==0.33.0": vllm_column.FILES}


def fetch(into: Path) -> None:
    """Downloads and extracts all wheels. Exits with pip's message if pip fails."""
    for requirement, names in PEERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            print(f"downloading {requirement} ...", flush=True)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch]
            subprocess.run([*command, requirement], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            print(f"{extract(wheel, names, into)} files of {requirement} under {into}")


def extract(wheel: Path, names: tuple[str, ...], into: Path) -> int:
    """Extracts the Python and JSON files whose names begin with one of `names`. Returns the number of these files."""
    with zipfile.ZipFile(wheel) as archive:
        chosen = [name for name in archive.namelist() if name.startswith(names) and name.endswith((".py", ".json"))]
        for name in chosen:
            archive.extract(name, into)
    return len(chosen)
