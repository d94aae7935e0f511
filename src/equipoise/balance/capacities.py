"""The capacities of all layers of a handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from equipoise.balance.capacity import taken
from equipoise.balance.limits import LayerCapacity
from equipoise.nn.limiter import Capacity as Settings

if TYPE_CHECKING:
    from equipoise.balance.layers import Layer


class Capacities:
    """The capacities of all layers of a handle; implements `parts.Part`."""

    name = "capacity"

    def __init__(self, settings: Settings, layers: Sequence[Layer], blocks: Sequence[nn.Module]):
        term = taken(settings)
        self.layers = [
            LayerCapacity(layer.site, layer.scores, block, term)
            for layer, block in zip(layers, blocks, strict=True)
        ]
        for layer, capacity in zip(layers, self.layers, strict=True):
            layer.capacity = capacity

    def before(self) -> None:
        """Nothing to do."""

    def after(self, counts: list[Tensor], step: int) -> None:
        """Take the step's load into the moving averages."""
        for layer, counts_E in zip(self.layers, counts, strict=True):
            if layer.settings.recent is not None and bool(counts_E.any()):
                layer.limiter.counts_E = counts_E
                layer.limiter.step()

    def forget(self) -> None:
        """Nothing is gathered within a step."""

    def metrics(self) -> dict[str, float]:
        """None of its own: balance/dropped_share is a measure of every step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The moving averages, one [E] a layer, or nothing."""
        shares = [layer.limiter.share_E for layer in self.layers]
        return {"share": [None if share_E is None else share_E.clone() for share_E in shares]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the moving averages over."""
        for layer, share_E in zip(self.layers, state["share"], strict=True):
            layer.limiter.load_state_dict({"share_E": share_E, "counts_E": None})

    def detach(self) -> None:
        """Nothing lies on the model."""
