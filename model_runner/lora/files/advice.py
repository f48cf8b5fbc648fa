"""What refusals tell the user to do with an adapter's directory: each line works as it stands."""

from __future__ import annotations

import re

from model_runner.lora.files.adapter_config import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

CONVERSION = (
    'python -c "import torch, safetensors.torch as s; t = torch.load('
    f"'{PICKLE_NAME}', map_location='cpu', weights_only=True); "
    f"s.save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{WEIGHTS_NAME}')\""
)
"""The command that converts a pickle, for the user to run in its directory. Chorus itself never opens a pickle."""

MERGE = "merge it into its model with PEFT's merge_and_unload() and serve the result with --model-path"
"""The advice for what PEFT serves and Chorus does not."""

ANOTHER_MODEL = "give --model-path the model that it was trained on"


def without_tensors(piece: str) -> str:
    """Returns the command that removes the tensors that have the component `piece` in their names."""
    if not re.fullmatch(r"[\w-]{1,60}", piece):
        return "remove it from the file"
    return (
        'run in its directory: python -c "import safetensors.torch as s; '
        f"f = '{WEIGHTS_NAME}'; t = s.load_file(f); "
        f"s.save_file({{k: t[k] for k in t if '{piece}' not in k.split('.')}}, f)\""
    )


def without_option(option: str) -> str:
    """Returns the advice to remove an option."""
    return f"take {option} out of {CONFIG_NAME}"


def with_option(option: str, value: str) -> str:
    """Returns the advice to set an option to `value`, in JSON."""
    return f'set "{option}" to {value} in {CONFIG_NAME}'
