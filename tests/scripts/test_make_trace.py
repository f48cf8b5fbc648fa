"""The trace writer: the file has the requests that the printed line counts."""

from __future__ import annotations

from pathlib import Path

import make_trace
import pytest

from scheduler.simulate.trace import read


def test_trace_file_has_the_printed_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.jsonl"
    flags = ["--adapters", "9", "--requests", "200", "--prompt", "5:7", "--output", "3", "--tenants", "2"]
    assert make_trace.main(["zipf", *flags, "-o", str(out)]) == 0
    requests = read(out)
    assert "200 requests" in capsys.readouterr().out
    assert {request.output for request in requests} == {3}
    assert {request.prompt for request in requests} == {5, 6, 7}
    assert {request.tenant for request in requests} == {"t0", "t1"}


def test_bad_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        make_trace.main(["zipf", "--prompt", "9:3", "-o", str(tmp_path / "t.jsonl")])
