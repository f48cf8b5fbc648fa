"""Every function that can be compiled, by name. A maker's module is the whole truth of it: a change there, and nowhere
else, makes what was compiled before stale.
"""

from __future__ import annotations

from collections.abc import Callable

from model_runner.compiled import attending, decoding, deltas, gates, norms, ropes
from model_runner.compiled.program import Function, Program

FUNCTIONS: dict[str, Callable[[Function], Program]] = {
    "add_norm": norms.add_norm,
    "silu_mul": gates.silu_mul,
    "rope_and_store": ropes.rope_and_store,
    "decodes": decoding.decodes,
    "prefill": attending.prefill,
    "delta": deltas.delta,
}
