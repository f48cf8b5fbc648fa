"""A local directory wins; anything else is a hub id or one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import hub
from engine.errors import ConfigError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.local_directory(str(tmp_path), "--model-path") == tmp_path.resolve()


@pytest.mark.parametrize("source", ["/no/such/place", "./nope", "name", "a/b/c", "../x/y"])
def test_what_is_neither_directory_nor_hub_id_says_so(source: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        hub.local_directory(source, "--model-path")


def test_a_file_asks_for_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        hub.local_directory(str(file), "--model-path")


@pytest.mark.parametrize("source", ["org/name", "org/name@v1.2"])
def test_a_hub_id_offline_is_one_line(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        hub.local_directory(source, "--model-path")
    assert source in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("patterns", [hub.MODEL_FILES, hub.TOKENIZER_FILES])
@pytest.mark.parametrize(("source", "revision"), [("org/name", None), ("org/name@v1", "v1")])
def test_a_hub_id_fetches_only_what_is_patterns(
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
