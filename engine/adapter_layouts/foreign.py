"""Names what a directory without adapter_config.json is, by the names of its files and the headers of its weights.

Nothing is loaded: of a safetensors file the first bytes of the header are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from engine.adapter_layouts.nested import CONFIG_NAME, adapters_below
from engine.directory import Directory
from engine.errors import AdapterError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HEADER_BYTES = 64 << 10

EXPORT = "export it as a PEFT directory (adapter_config.json and adapter_model.safetensors)"

BY_NAMES: tuple[tuple[str, Sequence[str]], ...] = (
    ("a GGUF file, as llama.cpp reads it: give the PEFT directory that it was converted from", ("*.gguf",)),
    (
        "adapters of mlx-lm without their adapter_config.json: copy it from where they were trained",
        ("adapters.safetensors", "adapters.npz"),
    ),
    (f"a NeMo checkpoint: {EXPORT}", ("*.nemo", "model_config.yaml", "adapter_metadata.json")),
    (
        f"a Megatron checkpoint: {EXPORT}",
        ("latest_checkpointed_iteration.txt", "iter_[0-9]*", "mp_rank_[0-9]*", "*distrib_optim*"),
    ),
    (
        "a DeepSpeed checkpoint: run its zero_to_fp32.py, and save the adapter with PEFT's save_pretrained",
        ("zero_to_fp32.py", "global_step[0-9]*", "*_optim_states.pt"),
    ),
)
"""What a directory is, with patterns of names of which one is enough."""

BY_HEADERS: tuple[tuple[str, Sequence[bytes]], ...] = (
    (f"a LoRA of kohya's sd-scripts, which are for diffusion models: {EXPORT}", (b'"ss_', b'"lora_unet', b'"lora_te')),
    (
        f"a LoRA of mistral-finetune: {EXPORT}",
        (b".attention.wq.lora_", b".attention.wv.lora_", b".feed_forward.w1.lora_"),
    ),
)
"""What a directory is, with parts of the header of a safetensors file of which one is enough."""


def describe(directory: Directory) -> str:
    """Returns why `directory`, which has no adapter_config.json, is no adapter, and what to do: one phrase."""
    names = directory.names()
    with_weights = next((name for name in WEIGHTS if name in names), None)
    if with_weights is not None:
        return (
            f"there is no {CONFIG_NAME} beside its {with_weights}: copy it from where the adapter was trained, or write"
            ' one with "peft_type", "r" and "lora_alpha"'
        )
    found = next((what for what, patterns in BY_NAMES if _any(names, patterns)), None) or _by_headers(directory, names)
    if found is not None:
        return f"there is no {CONFIG_NAME} in it; it looks like {found}"
    below = adapters_below(directory.path)
    if below:
        return f"there is no {CONFIG_NAME} in it, but in {', '.join(below[:3])}: give {below[0]}"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return f"there is no {CONFIG_NAME} in it; it is a whole model: serve it with --model-path"
    return f"there is no {CONFIG_NAME} in it"


def _any(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _by_headers(directory: Directory, names: Sequence[str]) -> str | None:
    for name in [name for name in names if name.endswith(".safetensors")][:8]:
        header = _try(lambda name=name: directory.open(name).read(HEADER_BYTES))  # type: ignore[misc]
        for what, marks in BY_HEADERS:
            if any(mark in header for mark in marks):
                return what
    return None


def _try(read: Callable[[], bytes]) -> bytes:
    """Returns what `read` returns, or nothing for a file that cannot be read."""
    try:
        return read()
    except (AdapterError, OSError):
        return b""
