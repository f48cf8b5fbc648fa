"""Resolves a path or a hub id (`org/name` or `org/name@revision`) to a local directory.

Only weights, tokenizer and config files are downloaded, by huggingface_hub with its progress bars. Files in its cache
are used without a network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from engine.directory import real_path
from engine.errors import ConfigError, StorageFailed, is_server_fault

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.*"]
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def tokenizer_directory(source: str, what: str) -> Path:
    """Like `local_directory`, for the tokenizer files only. Raises ConfigError if there is no tokenizer.json."""
    directory = local_directory(source, what, TOKENIZER_FILES)
    if not (directory / TOKENIZER).is_file():
        raise ConfigError(f"{what}: {source} cannot be used, it has no {TOKENIZER}")
    return directory


def local_directory(source: str, what: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Returns the directory that `source` refers to; downloads it if `source` is a hub id.

    `what` ("model", "adapter 'sql'") begins the message of a ConfigError, `patterns` select the files to download.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (real := real_path(path)):
        return Path(real)
    if path.is_file():
        raise ConfigError(f"{what}: {source} is a file; give the directory that holds it")
    if not _HUB_ID.fullmatch(source):
        raise ConfigError(f"{what}: {source} is neither a directory nor a hub id (org/name or org/name@revision)")
    return _download(source, what, patterns)


def _download(source: str, what: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most launches do not need it
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = source.partition("@")
    try:
        directory = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns))).resolve()
    except GatedRepoError as error:
        raise ConfigError(f"{what}: {repo} is gated; ask for access there, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{what}: {repo} has no revision {revision or 'main'}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{what}: no directory and no hub repository is called {repo}") from error
    except HFValidationError as error:
        raise ConfigError(f"{what}: {source} is no hub id: {error}") from error
    except Exception as error:  # any error of the network or the cache ends the launch with one line
        if is_server_fault(error):
            from huggingface_hub.constants import HF_HUB_CACHE

            raise StorageFailed(
                f"{what}: {source} cannot be kept under {HF_HUB_CACHE} ({error}): free space there, then try again"
            ) from error
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{what}: {source} is no local directory, and fetching it from the hub failed ({line}). "
            "Is it a mistyped path? Offline, download it first: hf download " + repo
        ) from error
    if not revision and directory.parent.name == "snapshots":
        log.info("%s: %s is %s@%s", what, repo, repo, directory.name)
    return directory
