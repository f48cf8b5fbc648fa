"""The metrics that /metrics shows."""

from __future__ import annotations

import re

import msgspec

from engine.messages import Capacity, Stats
from tokenizer_proc.telemetry.gauges import MetricsSnapshot, most_resident
from tokenizer_proc.telemetry.metrics import Metrics

CAPACITY = Capacity(kv_pages=8, page_size=16, rows=2, max_length=64, max_batched_tokens=8, vocab_size=10)


def test_lora_info_has_one_series() -> None:
    pictures = [
        MetricsSnapshot(
            max_loras=4,
            waiting={"c": 1, "a": 1},
            wanted=["d"],
            tiers={"b": "resident", "a": "resident", "c": "host", "e": "disk"},
        ),
        MetricsSnapshot(max_loras=4, tiers={"z": "resident"}),
    ]
    metrics = Metrics("base", lambda: pictures[0])
    line = r"^vllm:lora_requests_info\{(.*)\} ([\d.e+]+)$"
    [(labels, value)] = re.findall(line, metrics.render().decode(), re.MULTILINE)
    assert labels == 'max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c,d"'
    assert float(value) > 1.7e9
    pictures.pop(0)
    [(labels, _)] = re.findall(line, metrics.render().decode(), re.MULTILINE)
    assert labels == 'max_lora="4",running_lora_adapters="z",waiting_lora_adapters=""'
    pictures[0] = MetricsSnapshot()
    assert "lora_requests_info" not in metrics.render().decode()


def test_series_have_vllms_names() -> None:
    metrics = Metrics("base", lambda: MetricsSnapshot(stats=Stats(kv_pages=4, kv_pages_used=1), capacity=CAPACITY))
    text = metrics.render().decode()
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "chorus:kv_pages_cached",
        "chorus:requests_waiting_for",
        "chorus:kv_evictions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:gpu_cache_usage_perc",
        "vllm:time_per_output_token_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket",
        "vllm:request_inference_time_seconds_bucket",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
        "vllm:request_max_num_generation_tokens_bucket",
    ):
        assert f"\n{name}{{" in text, name
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="8"} 1.0' in text


def test_the_process_is_measured() -> None:
    text = Metrics("base").render().decode()
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0]) > 0


def test_max_lora_is_how_many_adapters_can_be_resident() -> None:
    pool = msgspec.structs.replace(CAPACITY, rank_pages={"qkv": 40, "down": 20}, max_lora_rank=64)
    assert most_resident(None, 4, 0, []) == 4
    assert most_resident(pool, 4, 0, []) == 5, "of the largest rank while none is known"
    assert most_resident(pool, 4, 0, [{"qkv": 1}]) == 40
    assert most_resident(pool, 4, 0, [{"qkv": 1}, {"qkv": 3, "down": 2}]) == 20
    assert most_resident(pool, 4, 7, [{"down": 5}]) == 7, "never less than are resident"
    assert most_resident(pool, 4, 0, [{"down": 20}]) == 4, "never less than a step may use"


def test_metrics_without_adapters_name_none() -> None:
    """All other series are the same."""
    snapshot = MetricsSnapshot(
        stats=Stats(),
        capacity=CAPACITY,
        max_loras=4,
        running={"canary-1": 2},
        waiting={"canary-2": 1},
        wanted=["canary-3"],
        tiers={"canary-1": "resident", "canary-2": "host"},
    )
    metrics = Metrics("base", lambda: snapshot)
    metrics.began(["canary-1"], 5)
    metrics.generated(["canary-1"], 7)
    shown, hidden = metrics.render().decode(), metrics.render(with_adapters=False).decode()
    assert shown.count("canary") > 5
    assert "canary" not in hidden
    assert 'max_lora="4",running_lora_adapters="",waiting_lora_adapters=""' in hidden

    def others(text: str) -> list[str]:
        left_out = ("#", "vllm:lora_requests_info{", "process_")
        return [line for line in text.splitlines() if "canary" not in line and not line.startswith(left_out)]

    assert others(shown) == others(hidden)


def test_two_servers_have_separate_registries() -> None:
    one, two = Metrics("base"), Metrics("base")
    one.began(["sql"], 5)
    assert b"sql" in one.render()
    assert b"sql" not in two.render()
    one.forget_adapter("sql")
    assert b"sql" not in one.render()
    one.forget_adapter("never seen")
