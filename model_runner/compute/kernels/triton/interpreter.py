"""Whether kernels run in triton's interpreter: one program after another, each some milliseconds, on the CPU."""

from __future__ import annotations

import triton


def interpreting() -> bool:
    """What the environment (TRITON_INTERPRET) said when triton was imported."""
    return bool(triton.knobs.runtime.interpret)
