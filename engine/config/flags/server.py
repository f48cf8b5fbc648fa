"""The server flags: addresses, API keys, limits on requests and clients, model names, logs."""

from __future__ import annotations

import argparse


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", help="address to bind (127.0.0.1)")
    add("--port", type=int, help="port to bind; 0 takes any free one (30000)")
    add(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="keys: every call but the probes, /metrics and /docs then needs `Authorization: Bearer KEY`. A sole key "
        "is the operator's. The variables CHORUS_API_KEY and VLLM_API_KEY do the same and are not visible in a "
        "process list (none)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help="keys with rules, a JSON object a line: key, tenant, adapters, base, requests_per_minute, "
        "tokens_per_minute, operator (none)",
    )
    add(
        "--metrics-rights",
        choices=["auto", "open", "hide-adapters", "operator"],
        help="who may read /metrics. open: every client; hide-adapters: every client, but adapters' names only with an "
        "operator's key; operator: an operator's key; auto: hide-adapters with API keys, else open (auto)",
    )
    add(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        metavar="HOST",
        help="further Host headers that calls may have, such as the outer name of a proxy, *.example.com, or * for "
        "all. On a loopback bind other names than this machine's are a 403 (none; on other binds all)",
    )
    add(
        "--max-open-requests",
        type=int,
        metavar="N",
        help="answers in progress at one time; more are refused at once with 503, Retry-After and what the open "
        "requests wait for (4096)",
    )
    add(
        "--max-queued-tokens",
        type=int,
        metavar="N",
        help="prompt tokens of all open requests together; more are refused in the same way (no bound)",
    )
    add(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds that a request may take from its arrival; then it ends with a 504 that says how far it came, or "
        "what it waited for (no bound)",
    )
    add(
        "--max-stream-buffer",
        metavar="SIZE",
        help="bytes of an answer that may wait for a client that does not read it; above that its request is aborted "
        "and its connection closed (4MiB)",
    )
    add(
        "--stream-stall-timeout",
        type=float,
        metavar="S",
        help="seconds that a client may take nothing of an answer that waits for it; then the same (60)",
    )
    add(
        "--max-request-memory",
        metavar="SIZE",
        help="memory of all bodies and answers together, from their arrival until they are read; a request for which "
        "none is left is refused with 503 and Retry-After, one that needs more than two thirds with 413 (2GiB, or an "
        "eighth of the memory)",
    )
    add(
        "--read-timeout",
        type=float,
        metavar="S",
        help="seconds in which the head of a request must arrive, and its body, which gets another second for each "
        "16 KiB; then it is a 408 (30)",
    )
    add(
        "--max-connections",
        type=int,
        metavar="N",
        help="open connections; more are answered with 503, after one that is idle was closed in vain. At most what "
        "the limit on open files allows (8192)",
    )
    add(
        "--max-connections-per-address",
        type=int,
        metavar="N",
        help="open connections of one address; a proxy before the server counts as one (a quarter of "
        "--max-connections; all of them from loopback addresses)",
    )
    add(
        "--served-model-name", nargs="+", metavar="NAME", help="one or several names of the base model (the model path)"
    )
    add(
        "--chat-template",
        metavar="FILE",
        help="a jinja file, or the template itself; it also replaces the templates of adapters (the model's)",
    )
    add(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="origins whose web pages a browser lets call the server, as words or one JSON list; * is every one (none)",
    )
    add(
        "--allowed-methods",
        nargs="+",
        metavar="METHOD",
        help="methods that those pages may use (all)",
    )
    add(
        "--allowed-headers",
        nargs="+",
        metavar="HEADER",
        help="headers that those pages may send (all)",
    )
    add(
        "--allow-credentials",
        action="store_true",
        help="lets those pages send cookies and HTTP authentication of the browser (off)",
    )
    add("--seed", "--random-seed", type=int, help="makes requests without a seed of their own repeatable (none)")
    add("--log-level", choices=["debug", "info", "warning", "error"], help="what is logged to stderr (info)")
