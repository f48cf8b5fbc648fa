"""CompilationCounter: what it counts and logs."""

from __future__ import annotations

import pytest

from model_runner.platform.compilations import CompilationCounter


def test_compilation_while_serving_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    counter = CompilationCounter()
    counter.add("before")
    assert (counter.count, caplog.records) == (1, [])
    counter.serving = True
    counter.add("_shrink")
    assert counter.count == 2
    assert "_shrink" in caplog.text
