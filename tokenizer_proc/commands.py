"""Runs the commands of an embedding host: adapter calls and requests for information."""

from __future__ import annotations

import msgspec

from engine.messages import Answer, Command
from tokenizer_proc.adapters.lifecycle import LoadRequest
from tokenizer_proc.frontend import Frontend


async def run_command(frontend: Frontend, command: Command) -> Answer:
    """Runs `command` and returns its Answer. A load may take long. Raises the EngineError of a command that fails."""
    adapters, lifecycle, name = frontend.adapters, frontend.lifecycle, command.lora_name
    match command.call:
        case "list":
            return _list(frontend, command)
        case "info":
            info = frontend.info()
            return Answer(id=command.id, info={key: msgspec.Raw(msgspec.msgpack.encode(info[key])) for key in info})
        case "load":
            entry = await lifecycle.load(_load_request(command))
        case "unload":
            entry = await lifecycle.unload(name)
            await lifecycle.freed(entry)
        case "pin" | "unpin":
            entry = await lifecycle.pin(name, command.call == "pin")
    return Answer(id=command.id, adapters=[entry.card(adapters.base_names[0])])


def _list(frontend: Frontend, command: Command) -> Answer:
    """Returns an Answer with all adapters, or with the one that the command names."""
    if not command.lora_name:
        return Answer(id=command.id, adapters=frontend.adapters.cards())
    card = frontend.adapters.card(command.lora_name)
    return Answer(id=command.id, adapters=[] if card is None else [card])


def _load_request(command: Command) -> LoadRequest:
    return LoadRequest(
        name=command.lora_name,
        path=command.lora_path,
        pinned=command.pinned,
        preload=command.preload,
        load_inplace=command.load_inplace,
    )
