"""The tables of model families and adapter formats, from their registries."""

from __future__ import annotations

from model_runner.config import FAMILIES
from model_runner.lora.formats import registry
from tables.markdown import table


def families() -> str:
    """Returns the table of model families."""
    return table(("family", "notes"), [(family.title, family.note) for family in FAMILIES.values()])


def formats() -> str:
    """Returns the tables of PEFT's formats and their options: what each becomes when loaded, and what is refused."""
    rows = [(form.name, form.note) for form in registry.all_formats()] + list(registry.all_features().items())
    options = [(f"`{name}`", what) for name, what in registry.refused_options().items()]
    refused = table(("option of adapter_config.json", "what it is"), options)
    return "\n\n".join([table(("format or option", "how it is saved, and what it becomes"), rows), REFUSES, refused])


REFUSES = "An adapter is refused by name if it has one of these options, or any option or tensor that is not known:"
