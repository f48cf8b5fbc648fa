"""Local directories and hub ids; anything else is a one-line error."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import hub
from engine.errors import ConfigError


def test_local_directory_resolves_to_itself(tmp_path: Path) -> None:
    assert hub.local_directory(str(tmp_path), "--model-path") == tmp_path.resolve()


@pytest.mark.parametrize("source", ["/no/such/place", "./nope", "name", "a/b/c", "../x/y"])
def test_source_that_is_no_directory_or_hub_id_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        hub.local_directory(source, "--model-path")


def test_file_path_is_refused_naming_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        hub.local_directory(str(file), "--model-path")


@pytest.mark.parametrize("source", ["org/name", "org/name@v1.2"])
def test_hub_id_offline_is_a_one_line_error(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        hub.local_directory(source, "--model-path")
    assert source in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("patterns", [hub.MODEL_FILES, hub.TOKENIZER_FILES])
@pytest.mark.parametrize(("source", "revision"), [("org/name", None), ("org/name@v1", "v1")])
def test_hub_id_downloads_only_matching_files(
    patterns: list[str], source: str, revision: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.local_directory(source, "--model-path", patterns) == tmp_path.resolve()
    assert asked == {"repo": "org/name", "revision": revision, "patterns": patterns}
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns)
    assert not any("safetensors" in pattern for pattern in hub.TOKENIZER_FILES)
