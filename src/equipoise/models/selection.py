"""A selection bias for routers that have none: their own top-k, with a bias added for the choice.

While the router's block runs, its top-k over the experts is answered with the ids that the biased
scores select and the values that the unbiased ones have there, so that whatever the family makes
of the selected values (softmax before or after, renormalised, scaled) stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equipoise.errors import RoutingError
from equipoise.models.sites import RouterSite

_TOP_K = (torch.topk, torch.Tensor.topk)
_ARGMAX = (torch.argmax, torch.Tensor.argmax)
_MAX = (torch.max, torch.Tensor.max)

NO_BIAS = {
    "doge": "product keys choose pairs of halves, not experts",
    "phimoe": "SparseMixer draws its experts at random, by logits",
    "hash": "experts are looked up in a table",
    "Assignment": "tokens are assigned to experts in equal parts",
    "Random": "experts are drawn at random",
}
"""Families, score functions and parts of a router whose selection takes no bias, and why."""


class _BiasedTopK(TorchFunctionMode):
    """Inside, a top-k over the experts selects by score plus bias."""

    def __init__(self, bias_E: Tensor, top_k: int, function: str | None, multiply: bool) -> None:
        super().__init__()
        self.bias_E, self.top_k = bias_E, top_k
        self.function, self.multiply = function, multiply

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TOP_K and self._selects(args, kwargs.get("k", args[1] if args[1:] else None)):
            ids = torch.topk(self._biased(args[0]), self.top_k, dim=-1).indices
            return torch.return_types.topk((args[0].gather(-1, ids), ids))
        if (
            self.top_k == 1
            and (func in _ARGMAX or func in _MAX)
            and self._along_experts(args, kwargs)
        ):
            return self._first(func, args[0], bool(kwargs.get("keepdim", False)))
        return func(*args, **kwargs)

    def _first(self, func: Callable[..., Any], values: Tensor, keepdim: bool) -> Any:
        ids = self._biased(values).argmax(-1, keepdim=True)
        best = values.gather(-1, ids)
        if not keepdim:
            ids, best = ids.squeeze(-1), best.squeeze(-1)
        return ids if func in _ARGMAX else torch.return_types.max((best, ids))

    def _selects(self, args: tuple[Any, ...], k: Any) -> bool:
        return bool(k == self.top_k and self._over_experts(args))

    def _along_experts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return dim == -1 and self._over_experts(args)

    def _over_experts(self, args: tuple[Any, ...]) -> bool:
        values = args[0] if args else None
        return bool(
            isinstance(values, Tensor)
            and values.is_floating_point()
            and values.ndim >= 2
            and values.shape[-1] == self.bias_E.shape[0]
        )

    def _biased(self, values: Tensor) -> Tensor:
        """Scores plus bias in float32; experts that group limits ruled out stay out."""
        values = values.detach().float()
        if self.function == "softmax":
            scores = torch.softmax(values, dim=-1)
        elif self.function == "sigmoid":
            scores = torch.sigmoid(values)
        else:
            # Families that limit groups fill what they rule out with 0 or -inf.
            out = values <= 0 if self.function == "probabilities" else values.isneginf()
            scores = values.masked_fill(out, float("-inf"))
        bias_E = self.bias_E.to(scores.device)  # a model may be moved after it was attached
        return scores * bias_E if self.multiply else scores + bias_E


class BiasedSelection:
    """The bias of one site in place; `bias_E` may be changed in place at any time."""

    def __init__(
        self, site: RouterSite, block: nn.Module, bias_E: Tensor, *, multiply: bool = False
    ) -> None:
        self.bias_E = bias_E
        self._block = block
        self._before = vars(block).get("forward")
        inner = block.forward
        mode = _BiasedTopK(bias_E, site.top_k, _function(site), multiply)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return inner(*args, **kwargs)

        block.forward = forward

    def remove(self) -> None:
        """Give the block its own forward back."""
        if self._before is not None:
            self._block.forward = self._before
        else:
            vars(self._block).pop("forward", None)


def _function(site: RouterSite) -> str | None:
    if site.compares == "logits":
        return "sigmoid" if site.score_function == "sigmoid" else "softmax"
    return "probabilities" if site.score_function == "softmax" else None


def refuse_without_selection(site: RouterSite, router: nn.Module) -> None:
    """Raise RoutingError for a site whose selection can take no bias."""
    by = type(getattr(router, "selection", None)).__name__
    reason = NO_BIAS.get(site.family) or NO_BIAS.get(site.score_function) or NO_BIAS.get(by)
    if site.variable_top_k:
        reason = "its router does not pick the top-k experts of each token"
    if reason:
        itself = site.score_function == "relu"
        instead = (
            "; no Loss acts here either, this router steers itself" if itself else ", or use a Loss"
        )
        raise RoutingError(
            f"{site.path} ({site.family}): no selection bias can act here: {reason}. "
            f"Leave the layer out with layers={instead}."
        )
