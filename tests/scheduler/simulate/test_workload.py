"""scheduler.simulate.workload and trace: rates, skew and bursts match the parameters; files are read as written."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from engine.errors import ConfigError
from scheduler.simulate.trace import TraceRequest, hot_adapters, read, rescale, write
from scheduler.simulate.workload import KINDS, Workload


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def spread(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.mean(values)


@pytest.mark.parametrize("kind", KINDS)
def test_trace_has_the_given_rate_and_follows_the_seed(kind: str) -> None:
    workload = Workload(kind=kind, adapters=50, rate=20.0, requests=8000, seed=1)
    requests = workload.generate()
    assert len(requests) / requests[-1].at == pytest.approx(20.0, rel=0.1)
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    assert requests == workload.generate()
    assert requests != Workload(kind=kind, adapters=50, rate=20.0, requests=8000, seed=2).generate()


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_slora_adapters_have_their_own_gamma_arrivals(cv: float) -> None:
    requests = Workload(kind="slora", adapters=4, rate=10.0, requests=20000, alpha=1.0, cv=cv, seed=3).generate()
    times: dict[str | None, list[float]] = {}
    for one in requests:
        times.setdefault(one.adapter, []).append(one.at)
    for number in range(4):
        own = gaps(times[f"a{number}"])
        assert spread(own) == pytest.approx(cv, rel=0.2)
        assert 1 / statistics.mean(own) == pytest.approx(10 / (number + 1) / (25 / 12), rel=0.2)


def test_slora_code_has_one_gamma_process_and_a_power_law() -> None:
    requests = Workload(
        kind="slora-code", adapters=200, rate=10.0, requests=20000, alpha=0.3, cv=4.0, seed=4
    ).generate()
    assert spread(gaps([one.at for one in requests])) == pytest.approx(4.0, rel=0.15)
    busy = Counter(one.adapter for one in requests)
    for number in (0, 1, 9):  # probability of adapter i: ((i+1)/n)^alpha - (i/n)^alpha
        expected = ((number + 1) / 200) ** 0.3 - (number / 200) ** 0.3
        assert busy[f"a{number}"] / len(requests) == pytest.approx(expected, rel=0.15)
    uniform = Counter(
        one.adapter for one in Workload(kind="slora-code", adapters=10, requests=9000, alpha=1.0).generate()
    )
    assert max(uniform.values()) < 1.2 * min(uniform.values())


def test_zipf_weights_follow_the_rank() -> None:
    busy = Counter(one.adapter for one in Workload(adapters=100, requests=20000, alpha=1.0).generate())
    total = sum(1 / k for k in range(1, 101))
    for rank in (1, 2, 10):
        assert busy[f"a{rank - 1}"] / 20000 == pytest.approx(1 / rank / total, rel=0.15)


def test_bursts_are_in_the_first_part_of_each_period() -> None:
    workload = Workload(kind="bursts", rate=20.0, requests=20000, period=50.0, factor=5.0, burst_share=0.2)
    inside = sum(one.at % 50 < 10 for one in workload.generate())
    assert inside / 20000 == pytest.approx(5 * 0.2 / (5 * 0.2 + 0.8), rel=0.05)


def test_hot_set_drifts_each_period() -> None:
    requests = Workload(kind="drift", adapters=100, rate=20.0, requests=9000, period=100.0, step=10).generate()
    for period in range(4):
        busy = Counter(one.adapter for one in requests if int(one.at / 100) == period)
        assert busy.most_common(1)[0][0] == f"a{10 * period}"


def test_tenants_groups_and_base_share_are_as_given() -> None:
    requests = Workload(adapters=20, requests=4000, base_share=0.25, tenants=3, groups=2, prefix=100).generate()
    assert sum(one.adapter is None for one in requests) / 4000 == pytest.approx(0.25, abs=0.03)
    owners: dict[str, set[str]] = {}
    for one in requests:
        if one.adapter:
            owners.setdefault(one.adapter, set()).add(one.tenant)
    assert all(len(owner) == 1 for owner in owners.values())
    same = [one for one in requests if one.group == "0.1" and one.prefix == 100][:2]
    first, second = (one.tokens(number) for number, one in enumerate(same))
    assert first[:100] == second[:100]
    assert not set(first[100:]) & set(second[100:])


def test_trace_file_is_read_as_written(tmp_path: Path) -> None:
    requests = Workload(requests=50, tenants=2, groups=1, prefix=9).generate()
    write(tmp_path / "t.jsonl", requests)
    assert read(tmp_path / "t.jsonl") == requests


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no requests"),
        ('{"at": 0, "adapter": null, "prompt": 1, "output": 1}\n{"at": 1}', "line 2"),
        ('{"at": 0, "adapter": null, "prompt": 1, "output": 1, "colour": 1}', "colour"),
        ('{"at": 0, "adapter": null, "prompt": 0, "output": 1}', "at least 1"),
        ('{"at": -1, "adapter": null, "prompt": 1, "output": 1}', "seconds"),
        ('{"at": 0, "adapter": null, "prompt": 4, "output": 1, "prefix": 5}', "at most"),
    ],
)
def test_bad_trace_file_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read(path)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none")


def test_rescaled_trace_has_the_given_rate() -> None:
    requests = rescale(Workload(requests=100).generate(), 3.0)
    assert len(requests) / requests[-1].at == pytest.approx(3.0)


def test_hot_adapters_are_those_that_get_half() -> None:
    requests = [TraceRequest(at=0, adapter=name, prompt=1, output=1) for name in "aaaabbcdef"]
    assert hot_adapters(requests, None) == {"a", "b"}
    assert hot_adapters(requests, 1) == {"a"}
