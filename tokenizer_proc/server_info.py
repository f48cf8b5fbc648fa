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
        self._started = time.time()

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
            "uptime_seconds": time.time() - self._started,
            "open_requests": self._router.open,
            "lora_pool": _lora_pool(capacity, stats),
            "capacity": _named_fields(capacity),
            # without `step_seconds`, of which /metrics has a histogram
            "stats": _named_fields(msgspec.structs.replace(stats, step_seconds=[])),
            "long_waiting": self._long_waiting(),
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
