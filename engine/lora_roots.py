"""Checks where adapter files lie: only under the roots that the operator named, or in the hub's cache.

    --lora-root /srv/adapters     /srv/adapters/sql/adapter_config.json          yes
                                  /srv/adapters/sql/adapter_config.json -> /etc  no: the real path counts
    hub cache                     snapshots/<commit>/x.json -> ../../blobs/<h>   yes: a snapshot links into blobs

Devices, pipes and sockets are refused everywhere: reading them could block. These checks come before a load and report
what is wrong with a directory. Files may be swapped after the check, so every reader opens them with
`engine.directory`, which checks the same roots again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.directory import Directory, FileRefused, lies_under, real_path
from engine.errors import ConfigError

READ_SUFFIXES = (".json", ".safetensors", ".jinja")


def allowed_roots(roots: Sequence[str]) -> list[str]:
    """Returns the real paths of the roots and of the hub's cache, or [], which allows any path, if `roots` is empty."""
    if not roots:
        return []
    paths = (os.path.realpath(os.path.expanduser(root)) for root in (*roots, _hub_cache()))
    return list(dict.fromkeys(paths))


def check_path(path: str | Path, allowed: Sequence[str], what: str) -> None:
    """Raises ConfigError unless the real path lies under one of `allowed`, or `allowed` is empty."""
    if not lies_under(real_path(path), allowed):
        raise ConfigError(f"{what}: {path} lies outside of --lora-root and the hub cache ({', '.join(allowed)})")


def check_files(directory: Path, allowed: Sequence[str], what: str) -> list[str]:
    """Checks the directory and every file in it that a loader would read. Returns the names of these files.

    `what` begins the message of a ConfigError.
    """
    try:
        with Directory(directory, allowed) as opened:
            names = [name for name in opened.names() if name.endswith(READ_SUFFIXES)]
            for name in names:
                opened.check(name)
    except FileRefused as error:
        raise ConfigError(f"{what}: {error.path}: {error.reason}") from error
    return names


def _hub_cache() -> str:
    from huggingface_hub import constants  # slow to import, and needed only with roots

    return str(constants.HF_HUB_CACHE)
