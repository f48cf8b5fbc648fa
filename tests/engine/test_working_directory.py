"""Files in the working directory are not imported in place of installed packages, however they are called."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDARD = [
    "asyncio",
    "json",
    "logging",
    "queue",
    "random",
    "secrets",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "tempfile",
    "typing",
]
OWN = ["scheduler", "model_runner", "tokenizer_proc", "scripts", "tests"]


def _third_party() -> list[str]:
    """Returns the import names of the dependencies."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [dependency.replace(">", ";").replace("=", ";").split(";")[0] for dependency in dependencies]
    return [{"pyzmq": "zmq"}.get(name, name.replace("-", "_")) for name in names]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory of modules and packages that end the process that imports them."""
    names = [*STANDARD, *_third_party(), *OWN]
    assert "msgspec" in names
    assert "zmq" in names
    for number, name in enumerate(names):
        path = tmp_path / f"{name}.py" if number % 2 else tmp_path / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('hostile {name}')")
    return tmp_path


def _run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=100
    )


def test_launch_in_a_hostile_directory_imports_nothing_of_it(hostile: Path) -> None:
    done = _run(hostile, "-m", "engine.launch", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model-path" in done.stdout


def test_checkout_that_is_not_installed_still_works(hostile: Path) -> None:
    (hostile / "engine").symlink_to(ROOT / "engine")
    probe = "import runpy, sys; sys.argv = ['-m', '--help']; runpy.run_module('engine.launch', run_name='__main__')"
    for arguments in (["-m", "engine.launch", "--help"], ["-c", probe]):
        done = _run(hostile, *arguments)
        assert (done.returncode, done.stderr) == (0, "")


def test_embedding_program_keeps_its_path(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\nbefore = list(sys.path)\nimport engine\nengine.Engine()\n")
    done = _run(tmp_path, "-c", "import program, sys; print(sys.path == program.before, sys.path[0] == '')")
    assert done.stdout.split() == ["True", "True"]


def test_every_public_name_is_there() -> None:
    import engine

    assert all(getattr(engine, name).__module__.startswith("engine.") for name in engine.__all__)
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="nothing_such"):
        engine.nothing_such  # noqa: B018
