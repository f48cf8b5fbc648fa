"""Adapter files must lie under a root or in the hub's cache: symlinks, a real cache layout, devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config.lora_paths import AdapterSpec
from engine.config.server_args import DEMO, ServerArgs
from engine.errors import ConfigError
from engine.launch import _source, main
from engine.lora_roots import allowed_roots, check_files, check_path


def adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"x")
    return directory


def cached(cache: Path, commit: str = "c0ffee") -> Path:
    """Makes a snapshot in huggingface_hub's layout, with symlinks into blobs/, and returns it."""
    repo = cache / "models--org--sql"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for number, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (repo / "blobs" / f"hash{number}").write_text("{}")
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"hash{number}")
    return snapshot


def test_any_path_is_allowed_without_roots(tmp_path: Path) -> None:
    check_files(adapter(tmp_path / "a"), [], "it")
    check_path("/etc", [], "it")


def test_path_under_a_root_is_allowed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    check_files(adapter(root / "a"), [str(tmp_path / "other"), str(root)], "it")
    check_files(adapter(root / "deep" / "er"), [str(root)], "it")
    check_files(root / "a", [str(root / "a")], "it")
    link = tmp_path / "link"
    link.symlink_to(root)
    check_files(link / "a", [str(root)], "it")  # the real path is what is checked
    check_files(root / "a", allowed_roots([str(link)]), "it")


@pytest.mark.parametrize("where", ["outside/a", "root-2/a", "root/../outside/a"])
def test_path_outside_of_the_roots_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "root").mkdir()
    adapter((tmp_path / where).resolve())
    with pytest.raises(ConfigError, match="lies outside of --lora-root"):
        check_files(tmp_path / where, [str(tmp_path / "root")], "it")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_symlink_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    inside, outside = adapter(tmp_path / "root" / "a"), adapter(tmp_path / "outside")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    with pytest.raises(ConfigError, match=f"{name}: lies outside"):
        check_files(inside, [str(tmp_path / "root")], "it")
    check_files(inside, [], "it")
    (tmp_path / "root" / "all").symlink_to(outside)
    with pytest.raises(ConfigError, match="lies outside"):
        check_files(tmp_path / "root" / "all", [str(tmp_path / "root")], "it")


def test_hub_cache_is_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "root"
    root.mkdir()
    snapshot = cached(tmp_path / "hub")
    allowed = allowed_roots([str(root)])
    check_files(snapshot, allowed, "it")
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match="lies outside"):
        check_files(snapshot, allowed, "it")
    elsewhere = cached(tmp_path / "another-cache")
    with pytest.raises(ConfigError, match="lies outside"):
        check_files(elsewhere, allowed, "it")
    assert allowed_roots([]) == []


@pytest.mark.parametrize("roots", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_devices_and_pipes_are_never_opened(tmp_path: Path, name: str, roots: bool) -> None:
    directory = adapter(tmp_path / "root" / "a")
    allowed = [str(tmp_path / "root")] if roots else []
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(ConfigError, match="no regular file"):
        check_files(directory, allowed, "it")
    (directory / name).unlink()
    (directory / name).symlink_to(directory / name)  # a link to itself
    with pytest.raises(ConfigError, match="cannot be read"):
        check_files(directory, allowed, "it")
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError):
        check_files(directory, allowed, "it")


def test_adapters_given_at_start_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = adapter(tmp_path / "outside")
    (tmp_path / "root").mkdir()
    flags = ["--model-path", str(outside), "--port", "0", "--lora-root", str(tmp_path / "root")]
    assert main([*flags, "--lora-paths", f"sql={outside}"]) == 2
    assert "--lora-paths sql" in (complaint := capsys.readouterr().err)
    assert "lies outside of --lora-root" in complaint


def test_demo_adapters_need_no_root(tmp_path: Path) -> None:
    own = sorted(path for path in (DEMO / "adapters").iterdir() if path.is_dir())[0]
    args = ServerArgs(lora_root=[str(tmp_path)])
    source = _source(3, AdapterSpec(name="own", path=str(own)), args)
    assert (source.adapter_id, source.root) == (3, str(own.resolve()))
    assert source.roots[:2] == [str(tmp_path), str(DEMO)]
    with pytest.raises(ConfigError, match="lies outside"):
        _source(3, AdapterSpec(name="other", path=str(adapter(tmp_path.parent / "elsewhere"))), args)
