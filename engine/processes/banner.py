"""The lines printed when the engine is ready."""

from __future__ import annotations

from engine.processes.child import Facts

_WIDTH = 96


def banner(facts: Facts, seconds: float) -> str:
    """Returns the lines, made of the launcher's facts (url, address, model, adapters) and the runner's.

    `seconds` is the duration of the startup.
    """
    address = facts.get("url") or facts["address"]
    lines = [f"Chorus is ready at {address} after {seconds:.1f} s"]
    lines += [f"  {name:<9} {text}" for name, text in _rows(facts) if text]
    return "\n".join(lines)


def _rows(facts: Facts) -> list[tuple[str, str]]:
    return [
        (
            "model",
            f"{facts['model']} ({facts.get('family')}, {_bytes(facts.get('weight_bytes'))}) in {facts.get('dtype')}",
        ),
        ("device", f"{facts.get('device')}, {facts.get('attention_backend')} attention{_graphs(facts)}"),
        (
            "KV cache",
            f"{facts.get('kv_tokens')} tokens ({_bytes(facts.get('kv_bytes'))}), {facts.get('rows')} requests at once",
        ),
        ("LoRA", _lora(facts)),
        ("adapters", _adapter_names(facts.get("adapters"))),
        ("embed", f'Engine.connect("{facts["address"]}")'),
    ]


def _graphs(facts: Facts) -> str:
    rows = facts.get("graph_rows")
    return f", CUDA graphs of up to {rows} rows" if rows else ""


def _lora(facts: Facts) -> str:
    if not facts.get("max_loras"):
        return "off"
    targets = facts.get("lora_targets")
    shown = ", ".join(targets) if isinstance(targets, list) else "all modules"
    return (
        f"{facts.get('lora_backend')} backend, {facts['max_loras']} adapters in a step, rank up to "
        f"{facts.get('max_lora_rank')} on {shown} ({_bytes(facts.get('lora_bytes'))})"
    )


def _adapter_names(names: object) -> str:
    if not isinstance(names, list) or not names:
        return ""
    text = " ".join(names)
    return text if len(text) <= _WIDTH else text[:_WIDTH].rsplit(" ", 1)[0] + f" ... ({len(names)} in all)"


def _bytes(count: object) -> str:
    size = float(count) if isinstance(count, int | float) else 0.0
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
