"""Collects the content of /server_info, and of an embedding host's info call, as plain JSON types."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from engine.config.process_configs import TokenizerConfig
from engine.messages import Capacity, Stats
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.upstream.router import Router


class ServerInfo:
    """Collects the information about one front end. The server's uptime counts from the creation of this object."""

    def __init__(self, config: TokenizerConfig, adapters: AdapterRegistry, router: Router) -> None:
        self._config = config
        self._adapters = adapters
        self._router = router
        self._started = time.monotonic()

    def collect(self, capacity: Capacity | None, stats: Stats, max_length: int) -> dict[str, Any]:
        """Returns the configuration, capacity, counts, and the requests that have waited for more than a second."""
        return {
            **self._config.server_info,
            "model_path": self._config.model_path,
            "tokenizer_path": self._config.tokenizer_path,
            "served_model_names": self._adapters.base_names,
            "adapters": [card.name for card in self._adapters.cards()],
            "enable_lora": self._config.enable_lora,
            "max_length": max_length,
            "uptime_seconds": time.monotonic() - self._started,
            "open_requests": self._router.open,
            "lora_pool": _lora_pool(capacity, stats),
            "capacity": _named_fields(capacity),
            # without `step_seconds`, of which /metrics has a histogram
            "stats": _named_fields(msgspec.structs.replace(stats, step_seconds=[])),
            "long_waiting": self._long_waiting(),
        }

    def as_vllm(self, capacity: Capacity | None, max_length: int) -> dict[str, Any]:
        """Returns vLLM's shape: the configuration by parts, with its names. Unknown values are left out."""
        config, flags = self._config, self._config.server_info
        lora = {
            "max_loras": config.max_loras,
            "max_lora_rank": None if capacity is None else capacity.max_lora_rank,
            "max_cpu_loras": flags.get("max_loaded_loras"),
            "lora_dtype": flags.get("lora_dtype"),
        }
        parts = {
            "model_config": {
                "model": config.model_path,
                "tokenizer": config.tokenizer_path,
                "served_model_name": self._adapters.base_names,
                "dtype": None if capacity is None else f"torch.{capacity.dtype}",
                "max_model_len": max_length or None,
                "seed": config.seed,
            },
            "cache_config": {
                "block_size": None if capacity is None else capacity.page_size,
                "num_gpu_blocks": None if capacity is None else capacity.kv_pages,
                "gpu_memory_utilization": flags.get("mem_fraction_static"),
                "enable_prefix_caching": not flags.get("disable_radix_cache"),
            },
            "scheduler_config": {
                "max_num_seqs": None if capacity is None else capacity.rows,
                "max_num_batched_tokens": None if capacity is None else capacity.max_batched_tokens,
                "policy": flags.get("schedule_policy"),
            },
            "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
            "device_config": {"device": None if capacity is None else capacity.device},
            "lora_config": lora if config.enable_lora else None,
        }
        return {"vllm_config": parts, "vllm_env": {}, "system_env": {}}

    def load(self, capacity: Capacity | None, stats: Stats) -> dict[str, Any]:
        """Returns SGLang's shape of the load of one rank."""
        pages, rows = stats.kv_pages, 0 if capacity is None else capacity.rows
        size = 0 if capacity is None else capacity.page_size
        slots, used = self._config.max_loras, len(stats.running_adapters)
        return {
            "dp_rank": 0,
            "num_running_reqs": stats.running,
            "num_waiting_reqs": stats.waiting,
            "num_used_tokens": stats.kv_pages_used * size,
            "max_total_num_tokens": pages * size,
            "max_running_requests": rows,
            "token_usage": _share(stats.kv_pages_used, pages),
            "utilization": _share(stats.running, rows),
            "lora": {"slots_used": used, "slots_total": slots, "utilization": _share(used, slots)},
        }

    def _long_waiting(self) -> list[dict[str, Any]]:
        reasons = self._router.wait_reasons
        return [
            {
                "request_id": waiting.request_id,
                "adapters": self._adapters.names(lora),
                "seconds": round(waiting.seconds, 3),
                "tokens": waiting.generated,
                "reason": waiting.reason,
                "waits_for": reasons.describe(waiting.reason),
            }
            for waiting in reasons.long_waiting()
            if (lora := self._router.lora(waiting.request_id)) is not None
        ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _lora_pool(capacity: Capacity | None, stats: Stats) -> dict[str, dict[str, int]]:
    """Returns, by group, the number of rank pages, the number in use, and the bytes of one page."""
    if capacity is None:
        return {}
    return {
        group: {
            "pages": pages,
            "used": stats.rank_pages_used.get(group, 0),
            "page_bytes": capacity.rank_page_bytes.get(group, 0),
        }
        for group, pages in capacity.rank_pages.items()
    }


def _named_fields(value: Capacity | Stats | None) -> dict[str, Any] | None:
    """Returns the struct as a dict by field name, since it would be encoded as an array without names.

    `oldest_waiting` is left out, because /server_info shows it as `long_waiting`.
    """
    if value is None:
        return None
    return {name: field for name, field in msgspec.structs.asdict(value).items() if name != "oldest_waiting"}
