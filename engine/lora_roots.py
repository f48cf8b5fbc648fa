"""Checks that adapter files lie under one of the --lora-root directories or in the hub's cache.

    --lora-root /srv/adapters     /srv/adapters/sql/adapter_config.json          yes
                                  /srv/adapters/sql/adapter_config.json -> /etc  no: the real path counts
    hub cache                     snapshots/<commit>/x.json -> ../../blobs/<h>   yes: a snapshot links into blobs

Devices, pipes and sockets are refused everywhere: reading them could block. Knows nothing of formats.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError

READ_SUFFIXES = (".json", ".safetensors", ".jinja")


def check_path(path: str | Path, roots: Sequence[str], what: str) -> None:
    """Raises ConfigError unless the real path lies under a root or in the hub's cache; without roots any is allowed."""
    if not roots:
        return
    real = os.path.realpath(path)
    if not any(_lies_under(real, os.path.realpath(root)) for root in (*roots, _hub_cache())):
        raise ConfigError(f"{what}: {path} lies outside of --lora-root ({', '.join(roots)}) and of the hub cache")


def check_files(directory: Path, roots: Sequence[str], what: str) -> None:
    """Checks the directory and every file in it that a loader would read; `what` begins the message of a ConfigError.

    Missing files are left to the loader.
    """
    check_path(directory, roots, what)
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(READ_SUFFIXES))
    except OSError as error:
        raise ConfigError(f"{what}: {directory} cannot be read ({error.strerror})") from error
    for name in names:
        check_path(directory / name, roots, what)
        try:
            mode = os.stat(directory / name).st_mode
        except OSError as error:
            raise ConfigError(f"{what}: {directory / name} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{what}: {directory / name} is no regular file")


def _lies_under(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _hub_cache() -> str:
    from huggingface_hub import constants  # slow to import, and needed only where there are roots

    return str(constants.HF_HUB_CACHE)
