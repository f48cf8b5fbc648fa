"""Whether kernels run in triton's interpreter: on the CPU, one program after another, each for some milliseconds."""

from __future__ import annotations

import triton


def interpreting() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported."""
    return bool(triton.knobs.runtime.interpret)
