"""A mixture of experts: each token goes through the few experts its router picks, weighted by their probabilities.

    router probabilities of a token   [0.1  0.6  0.1  0.2]  ->  experts 1 and 3, weights 0.6 and 0.2 (or 0.75 and 0.25)

Each token is repeated once for each of its experts (a repetition is a pick), and the picks are sorted by expert, so
that one grouped matmul computes all experts; the number of picks of each expert stays on the device. Where a lane of
the step has rank pages of experts, the experts are computed one by one instead, each with a LoRA plan for its own
picks. The result of a token does not depend on the other tokens of the step.

Legend: T tokens, H hidden size, E experts, K experts of a token, n = T * K picks, I intermediate size of an expert on
this rank, O out features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grouped_mm

from model_runner.config import ModelConfig
from model_runner.lora.site import EXPERTS, ROUTER, Site, Slice
from model_runner.model.layers.linear import Linear
from model_runner.model.layers.mlp import gated_activation
from model_runner.model.layers.weights import Weights
from model_runner.quantization.plain import Plain
from model_runner.step.batch import Batch
from model_runner.step.layout import Layout


@dataclass(frozen=True)
class Expert:
    """The linears of one expert, whose weights are views of the layer's stacked weights."""

    gate_up: Linear
    down: Linear


class SparseMLP:
    """One layer's router and experts, used in place of an MLP."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        assert config.experts is not None
        experts, hidden = config.experts, config.hidden_size
        path = f"model.layers.{layer}.{experts.block}"
        inner = weights.shard.share(experts.width, "intermediate size of an expert")
        self.shard = weights.shard
        self.per_token, self.renormalize = experts.per_token, experts.renormalize
        self.gate = gated_activation(weights.ops, config.activation)
        self.gate_up_EIH = weights.empty(experts.count, 2 * inner, hidden)
        self.down_EHI = weights.empty(experts.count, hidden, inner)
        router_EH = weights.tensor(f"{path}.gate.weight", experts.count, hidden)
        cut = (Slice("gate", 0, experts.count),)
        self.router = Linear(Site(f"layers.{layer}.router", path, layer, ROUTER, cut, Plain(router_EH)))
        self.experts = [self._expert(config, layer, number, path, weights) for number in range(experts.count)]
        self._numbers_E = torch.arange(experts.count, device=weights.device)

    def _expert(self, config: ModelConfig, layer: int, number: int, path: str, weights: Weights) -> Expert:
        assert config.experts is not None
        gate_up_IH, down_HI = self.gate_up_EIH[number], self.down_EHI[number]
        inner, whole = down_HI.shape[1], config.experts.width
        gate, up, down = config.experts.names
        path = f"{path}.experts.{number}"
        weights.place(f"{path}.{gate}.weight", gate_up_IH[:inner], whole=whole)
        weights.place(f"{path}.{up}.weight", gate_up_IH[inner:], whole=whole)
        weights.place(f"{path}.{down}.weight", down_HI, whole=whole, dim=1)
        name, parts = f"layers.{layer}.experts.{number}", (Slice(gate, 0, inner), Slice(up, inner, 2 * inner))
        return Expert(
            Linear(Site(f"{name}.gate_up", path, layer, EXPERTS, parts, Plain(gate_up_IH))),
            Linear(Site(f"{name}.down", path, layer, EXPERTS, (Slice(down, 0, config.hidden_size),), Plain(down_HI))),
        )

    def linears(self) -> Iterator[Linear]:
        """Yields the router and the two linears of each expert."""
        yield self.router
        for expert in self.experts:
            yield from (expert.gate_up, expert.down)

    @property
    def needs_host_sync(self) -> bool:
        """Whether the forward waits for the device.

        Only Hopper and later GPUs, in bfloat16, have a grouped matmul whose group sizes stay on the device.
        """
        weight = self.down_EHI
        on_host = weight.device.type != "cuda" or weight.dtype != torch.bfloat16
        return on_host or torch.cuda.get_device_capability(weight.device) < (9, 0)

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the experts' output: [T, H] -> [T, H]."""
        weights_TK, experts_TK = self.route(x_TH, batch)
        experts_n, order_n = experts_TK.flatten().sort(stable=True)
        x_nH = x_TH[order_n // self.per_token]
        if batch.lanes_T is not None and self._any_lane_uses_experts(batch.lanes_T):
            y_nH = self._compute_by_expert(
                x_nH, experts_n, batch.lanes_T[order_n.cpu().numpy() // self.per_token], batch
            )
        else:
            y_nH = self._compute_grouped(x_nH, experts_n)
        mixed_TKH = torch.empty_like(y_nH).index_copy_(0, order_n, y_nH).view(*experts_TK.shape, -1)
        mixed_TH = (mixed_TKH * weights_TK[:, :, None]).sum(1)
        return self.shard.all_reduce(mixed_TH.to(x_TH.dtype))

    def route(self, x_TH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weights [T, K], in float32, and the indices [T, K] of the experts of each token."""
        probabilities_TE = self.router(x_TH, batch).float().softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.per_token, dim=-1)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, experts_TK

    def _any_lane_uses_experts(self, lanes_T: NDArray[np.int32]) -> bool:
        lora = self.router.lora
        return lora is not None and lora.pages.any_lane_uses(set(lanes_T.tolist()), EXPERTS)

    def _compute_grouped(self, x_nH: torch.Tensor, experts_n: torch.Tensor) -> torch.Tensor:
        """Computes each pick's output [n, H] by grouped matmuls; the picks are sorted by expert."""
        ends_E = torch.searchsorted(experts_n, self._numbers_E, right=True, out_int32=True)
        return _grouped(self.gate(_grouped(x_nH, self.gate_up_EIH, ends_E)), self.down_EHI, ends_E)

    def _compute_by_expert(
        self, x_nH: torch.Tensor, experts_n: torch.Tensor, lanes_n: NDArray[np.int32], batch: Batch
    ) -> torch.Tensor:
        """Computes each pick's output [n, H] one expert after the other, with the LoRA of each pick's lane."""
        y_nH = torch.empty_like(x_nH)
        numbers, begins = np.unique(experts_n.cpu().numpy(), return_index=True)
        for number, begin, end in zip(numbers, begins, [*begins[1:], len(lanes_n)], strict=True):
            expert = self.experts[number]
            assert expert.down.lora is not None, "lanes without a LoRA backend"
            own = replace(batch, lora=expert.down.lora.plan(_layout(lanes_n[begin:end])))
            y_nH[begin:end] = expert.down(self.gate(expert.gate_up(x_nH[begin:end], own)), own)
        return y_nH


def _grouped(x_nI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiplies the picks from ends_E[e - 1] to ends_E[e] by the weight of expert e: [n, I] -> [n, O]."""
    return grouped_mm(x_nI, weight_EOI.transpose(1, 2), offs=ends_E)


def _layout(lanes_n: NDArray[np.int32]) -> Layout:
    """Returns a layout of one-token rows in these lanes, for a LoRA plan; its other fields are dummies."""
    nothing = np.zeros_like(lanes_n)
    return Layout(nothing, nothing, np.ones_like(lanes_n), lanes_n, np.zeros((1, 1), np.int32), 1)
