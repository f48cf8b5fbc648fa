"""The facts of /server_info and of an embedding host's info call, of plain JSON types. Knows nothing of HTTP."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from engine.config.process_configs import TokenizerConfig
from engine.messages import Capacity, Stats
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.upstream.router import Router


class ServerInfo:
    """Collects facts of one front end; the server's uptime counts from here."""

    def __init__(self, config: TokenizerConfig, adapters: AdapterRegistry, router: Router) -> None:
        self._config = config
        self._adapters = adapters
        self._router = router
        self._started = time.time()

    def collect(self, capacity: Capacity | None, stats: Stats, max_length: int) -> dict[str, Any]:
        """Configuration, capacity, counts, and the requests that wait for more than a second."""
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
            "stats": _named_fields(msgspec.structs.replace(stats, step_seconds=[])),  # /metrics has their histogram
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
    """Rank pages by group: how many there are, how many are in use, and the bytes of one."""
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
    """A struct, which is an array on the wire, with the names of its fields. `long_waiting` has `oldest_waiting`."""
    if value is None:
        return None
    return {name: field for name, field in msgspec.structs.asdict(value).items() if name != "oldest_waiting"}
