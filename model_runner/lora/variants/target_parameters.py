"""`target_parameters`: LoRA on parameters that are no module's weight, such as the fused experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from model_runner.lora.variants.base import Variant


class TargetParameters(Variant, frozen=True, kw_only=True):
    """The option `target_parameters`: parameter names, in full or only their end after a dot."""

    target_parameters: list[str] | None = None

    @property
    def is_on(self) -> bool:
        """Whether a parameter is targeted."""
        return bool(self.target_parameters)

    @property
    def names(self) -> Sequence[str]:
        """The names in `target_parameters`."""
        return self.target_parameters or ()

    @property
    def whole_request_options(self) -> Sequence[str]:
        """The option `target_parameters`, which is not served with an activated LoRA."""
        return ["target_parameters"]
