"""A site: a linear, embedding or head that LoRA touches, as data with its slices (qkv has three, gate_up two).

The embedding is a linear of one-hot tokens: its in features are the vocabulary. A norm is a site too: an adapter can
only replace its weight. Does not depend on adapters or steps.
Legend: I in features, O out features (all slices side by side), of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_runner.quantization.base import LinearMethod

EMBED = "embed"
"""The group of the embedding."""

HEAD = "head"
"""The group of the head."""

ROUTER = "router"
"""The group of the routers of mixtures of experts."""

EXPERTS = "experts"
"""The group of all linears of all experts."""

NORMS = "norms"
"""The group of all norms: it has neither rank pages nor vector slots."""


def vectors_of(group: str) -> str:
    """Returns the group whose slots hold the vectors (gains and biases) of the sites of `group`."""
    return f"{group}.vectors"


def full_weights_of(group: str) -> str:
    """Returns the group whose slots hold the full weights of `group`, which replace the base's.

    All norms of an adapter share one slot.
    """
    return f"{group}.full"


@dataclass(frozen=True)
class Slice:
    """One projection inside a site: its checkpoint module name ("q_proj") and its output columns, `start` to `stop`."""

    module: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """The number of output columns."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Site:
    """One linear of the model as LoRA sees it.

    name      unique, e.g. "layers.3.qkv"
    path      module path of the parent in a checkpoint, e.g. "model.layers.3.self_attn"; a slice's full checkpoint
              name is f"{path}.{slice.module}"
    layer     index of the decoder layer, -1 outside of the layers
    group     sites whose rank pages go together: qkv, o, gate_up, down, embed, head, router, experts; norms
    base      the base linear [O, I] (row-parallel: I is the shard); for the embedding its table [I, O], for a norm
              its weight [O]
    tied      whether this is a head that shares the embedding's weight
    """

    name: str
    path: str
    layer: int
    group: str
    slices: tuple[Slice, ...]
    base: LinearMethod
    tied: bool = False

    @property
    def replaceable(self) -> bool:
        """Whether an adapter may replace the site's weight in full."""
        return self.group in (EMBED, HEAD, NORMS)

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary of the embedding or the head."""
        return self.base.shape[0]

    @property
    def embeds(self) -> bool:
        """Whether the site is the embedding, whose rows are looked up by token."""
        return self.group == EMBED

    @property
    def in_features(self) -> int:
        """I, the in features; 0 for a norm."""
        if self.group == NORMS:
            return 0
        return self.base.shape[0] if self.embeds else self.base.shape[1]

    @property
    def out_features(self) -> int:
        """O, the out features of all slices."""
        return self.base.shape[1] if self.embeds else self.base.shape[0]
