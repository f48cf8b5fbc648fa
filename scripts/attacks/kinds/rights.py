"""Calls beyond the rights of a key: routes of operators, other tenants' requests, and names that it may not know."""

from __future__ import annotations

import random
from typing import Any

from attacks.kind import Broken, kind
from attacks.target import Answer, Target, all_of

HIDDEN = "hush-42"
"""An adapter that the key `restricted` may not use."""

NOBODY = "mush-42"
"""A name that no adapter has, of the same length."""

ADMIN = [
    ("/load_lora_adapter", {"lora_name": "mine", "lora_path": "/tmp"}),
    ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "/tmp"}),
    ("/unload_lora_adapter", {"lora_name": "poet"}),
    ("/v1/unload_lora_adapter", {"lora_name": "poet"}),
    ("/pin_lora_adapter", {"lora_name": "poet"}),
    ("/unpin_lora_adapter", {"lora_name": "poet"}),
    ("/load_lora_adapter_from_tensors", {"lora_name": "a", "serialized_tensors": ["x"]}),
]
REFUSED = (401, 403, 404)


@kind("rights.matrix")
async def matrix(target: Target, draw: random.Random) -> None:
    """Every operator's route with every other key: 401, 403 or 404, and nothing is told."""
    for key in (None, "attacker", "restricted", "limited", "wrong"):
        for path, body in ADMIN:
            answer = await target.call(path, body, key=key)
            if answer.status not in REFUSED:
                raise Broken(f"{path} with the key {key}: {answer.status} {answer.text[:200]}")
            if HIDDEN in answer.text:
                raise Broken(f"{path} with the key {key} tells of {HIDDEN}")
        for path in ("/server_info", "/get_server_info"):
            answer = await target.call(path, method="GET", key=key)
            if answer.status not in REFUSED:
                raise Broken(f"{path} with the key {key}: {answer.status}")
    for key in (None, "wrong"):
        for path in ("/v1/models", "/version"):
            await target.call(path, method="GET", key=key, expect=(401, 503))
        await target.call("/generate", {"input_ids": [9]}, key=key, expect=(401, 503))


@kind("rights.admin_key")
async def admin_key(target: Target, draw: random.Random) -> None:
    """The admin key opens what only operators may do."""
    await target.call("/server_info", method="GET", key="admin", expect=(200, 503))
    await target.call("/abort_request", {"rid": "nobody"}, key="admin", expect=(200, 404, 503))


@kind("rights.others_requests")
async def others_requests(target: Target, draw: random.Random) -> None:
    """Aborts of another tenant's requests by guessed ids, by none, by all; own requests with its ids."""
    guessed = [f"victim-{stream}-{turn}" for stream in range(16) for turn in range(draw.randrange(1, 60))]
    aborts: list[dict[str, Any]] = [
        {"rid": guessed}, {"rid": draw.choice(guessed)}, {"abort_all": True}, {"rid": "", "abort_all": True},
        {"rid": "victim-*"}, {"rid": [], "abort_all": True},
    ]  # fmt: skip
    params = {"max_new_tokens": 200, "ignore_eos": True}
    squatted = [draw.choice(guessed) for _ in range(4)]
    bodies = [{"input_ids": [9, 10], "rid": rid, "sampling_params": params, "stream": True} for rid in squatted]
    await all_of(
        *(target.leave("/generate", body, draw.uniform(0.5, 2)) for body in bodies),
        *(target.call("/abort_request", body, key=key) for body in aborts for key in ("attacker", "restricted")),
        target.call("/abort_request", {"abort_all": True}, key=None, expect=(401, 503)),
    )


def without(answer: Answer, name: str) -> str:
    """Returns the answer's text with a name replaced, so that answers for two names can be compared."""
    return answer.text.replace(name, "NAME")


@kind("rights.hidden_names")
async def hidden_names(target: Target, draw: random.Random) -> None:
    """A key that may not use an adapter is answered as if it did not exist, on every route and in every form."""
    messages = [{"role": "user", "content": "Hi"}]

    def calls(name: str) -> list[tuple[str, str, Any]]:
        return [
            ("GET", f"/v1/models/{name}", None), ("GET", f"/v1/models/{name}_lora_adapter", None),
            ("GET", f"/v1/models/chorus-demo:{name}", None), ("GET", f"/v1/models/%20{name}", None),
            ("POST", "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1}),
            ("POST", "/v1/completions", {"model": f"chorus-demo:{name}", "prompt": "a", "max_tokens": 1}),
            ("POST", "/v1/chat/completions", {"model": name, "messages": messages, "max_tokens": 1}),
            ("POST", "/v1/chat/completions", {"lora_path": {name: 0.5}, "messages": messages, "max_tokens": 1}),
            ("POST", "/generate", {"text": "a", "lora_path": name}),
            ("POST", "/generate", {"text": ["a", "b"], "lora_path": ["public-1", name]}),
            ("POST", "/generate", {"text": "a", "lora_path": {"public-1": 0.5, name: 0.5}}),
            ("POST", "/tokenize", {"prompt": "a", "model": name}),
            ("POST", "/detokenize", {"tokens": [9], "model": name}),
            ("POST", "/unload_lora_adapter", {"lora_name": name}),
            ("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": "/tmp"}),
            ("POST", "/pin_lora_adapter", {"lora_name": name}),
        ]  # fmt: skip

    for (method, path, body), (_, path_of_nobody, body_of_nobody) in zip(calls(HIDDEN), calls(NOBODY), strict=True):
        hidden = await target.call(path, body, method=method, key="restricted")
        absent = await target.call(path_of_nobody, body_of_nobody, method=method, key="restricted")
        if 503 in (hidden.status, absent.status):
            continue
        if (hidden.status, without(hidden, HIDDEN)) != (absent.status, without(absent, NOBODY)):
            raise Broken(
                f"{method} {path}: {hidden.status} {hidden.text[:150]} for a hidden name, "
                f"{absent.status} {absent.text[:150]} for none"
            )
    for path in ("/v1/models", "/version", "/server_info", "/nowhere"):
        answer = await target.call(path, method="GET", key="restricted")
        if HIDDEN in answer.text:
            raise Broken(f"{path} tells of {HIDDEN}")


@kind("rights.paths")
async def paths(target: Target, draw: random.Random) -> None:
    """Other spellings of an operator's path: encoded, doubled, with dots, cases or another method."""
    for path in draw.sample([path for path, _ in ADMIN] + ["/server_info", "/abort_request"], 3):
        for spelled in (
            path + "/", "/" + path, path.upper(), "/v1/.." + path, path.replace("_", "%5f"), path + "?a=b",
            path + "%00", path + ";a", "/%2e" + path,
        ):  # fmt: skip
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                answer = await target.call(spelled, {}, method=method, key="restricted", may_cut=True)
                is_abort = "abort" in spelled.lower()  # a key may abort its own requests
                if 200 <= answer.status < 300 and not is_abort:
                    raise Broken(f"{method} {spelled}: {answer.status} {answer.text[:100]}")
