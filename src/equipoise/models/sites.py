"""A router site: one place in a model where tokens are sent to experts, and how to watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from equipoise.errors import RoutingError
from equipoise.models.steering import Steerer
from equipoise.models.taps import Ears, Observer, Selection, Tap, tap_of
from equipoise.routing import NO_EXPERT, Routing

Interpreter = Callable[[Tensor, Tensor | None], Tensor]
"""From ids and weights as the model passes them to ids in which NO_EXPERT stands for no expert."""

_VALID_T: ContextVar[Tensor | None] = ContextVar("valid_T", default=None)


@contextmanager
def valid_tokens(mask_BS: Tensor | None, *, unless_told: bool = False) -> Iterator[None]:
    """Say which token rows of the forward passes inside are tokens (True) and not padding.

    With unless_told, what was said further out stands.

    A site takes the mask, flattened, where it has as many elements as the site has rows;
    elsewhere (a vision tower, a decoding step) every row counts as a token.
    """
    told = _VALID_T.get()
    valid_T = None if mask_BS is None else mask_BS.reshape(-1).bool()
    token = _VALID_T.set(told if unless_told and told is not None else valid_T)
    try:
        yield
    finally:
        _VALID_T.reset(token)


class Handle:
    """An observation, to be ended by `remove()` or as a context manager; ending twice is fine."""

    def __init__(self, tap: Tap, observer: Observer) -> None:
        self._tap, self._observer = tap, observer

    def remove(self) -> None:
        """End the observation; the last one of a site takes its hooks from the model."""
        self._tap.discard(self._observer)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class Steered:
    """A steerer in place, to be taken away by `remove()`; twice is fine."""

    def __init__(self, tap: Tap) -> None:
        self._tap, self._steerer = tap, tap.steerer

    def remove(self) -> None:
        """Take the steerer away, and the hooks if nobody listens either."""
        if self._tap.steerer is self._steerer:
            self._tap.drop_steerer()


@dataclass(eq=False)
class RouterSite:
    """One router of a model: what it chooses from, and how to hear what it chooses."""

    layer: int
    """True layer number in the model, dense layers counted."""
    path: str
    """Module path of the MoE block, or of its experts where the block is a whole layer; unique."""
    stack: str
    """The path up to the layer number: layers of one stack see the same token rows."""
    num_experts: int
    """Experts that compute; ids lie in [0, num_experts) or are NO_EXPERT."""
    top_k: int
    """Experts selected for each token."""
    score_function: str
    """"softmax", "sigmoid", "sqrtsoftplus", "sparsemixer", "hash" or "unknown"."""
    selection_bias: bool
    """True where a bias that enters selection only (not the weights) is added to the scores."""
    shared_experts: int
    """Experts that every token visits besides the selected ones; not counted in num_experts."""
    family: str
    """The model's `config.model_type`."""
    scores_are: str = "logits"
    """What the router gives as scores: "logits", "probabilities" (gemma4), or "gates", which are
    scores after the score function (torchtitan)."""
    compares: str = "scores"
    """What its top-k compares: "scores" (after the score function) or "logits"."""
    selects_in_block: bool = False
    """The block around the router takes the top-k, not the router (dbrx)."""
    variable_top_k: bool = False
    """Tokens get up to any number of experts; rows are padded with NO_EXPERT."""
    null_experts: int = 0
    """Choices of the router beyond the experts that compute nothing, recorded as NO_EXPERT."""
    module: nn.Module = field(kw_only=True, repr=False)
    ears: Ears = field(kw_only=True, repr=False)
    interpret: Interpreter | None = field(kw_only=True, repr=False, default=None)
    refresh: Callable[[], None] | None = field(kw_only=True, repr=False, default=None)

    def observe(self, callback: Callable[[Routing], None], *, scores: bool = True) -> Handle:
        """Call `callback` with the Routing of every forward pass, until the handle is removed.

        scores=False leaves `scores_TE` out where hearing it would take a hook of its own.

        The tensors belong to the model: copy what is kept. Nothing is copied, moved or waited for
        here. Raises RoutingError, in the forward pass, where ids do not have the site's shape.
        """

        def observer(ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> None:
            callback(self.routing(ids, weights, scores))

        return self.listen(observer, scores=scores)

    def listen(self, observer: Observer, *, scores: bool = True) -> Handle:
        """Call `observer` with ids, weights and scores just as the model passes them.

        For those who must cost next to nothing; `selection` makes of them what `observe` delivers.
        """
        tap = tap_of(self.module)
        before = tap.handles
        tap.add(observer, self.ears, scores)
        fresh = tap.handles is not before
        if fresh and self.refresh is not None:
            self.refresh()
        return Handle(tap, observer)

    def steer(self, steerer: Steerer) -> Steered:
        """Let `steerer` act on every forward and backward pass, until the handle is removed.

        Raises RoutingError where another one acts already.
        """
        tap = tap_of(self.module)
        if tap.steerer is not None:
            raise RoutingError(
                f"{self.path} is already steered: detach() the handle that balances this model "
                "before attaching another."
            )
        tap.take_steerer(steerer, self.ears)
        if self.refresh is not None:
            self.refresh()
        return Steered(tap)

    def selection(self, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> Selection:
        """Ids and weights [T, K], scores [T, E]: checked, in rows, NO_EXPERT where there is none."""
        ids = _rows(ids)
        self._check_ids(ids)
        if weights is not None:
            weights = _rows(weights)
            if weights.shape != ids.shape:
                weights = _selected(weights, ids, self)
        if scores is not None:
            scores = _rows(scores)
            scores = scores if len(scores) == len(ids) else None
        if self.interpret is not None:
            ids = self.interpret(ids, weights)
        return ids, weights, scores

    def routing(self, ids: Tensor, weights: Tensor | None, scores: Tensor | None) -> Routing:
        """The Routing of a decision as the model passes it."""
        ids, weights, scores = self.selection(ids, weights, scores)
        valid_T = _VALID_T.get()
        if valid_T is not None and len(valid_T) != len(ids):
            valid_T = None
        return Routing(self.layer, self.path, ids, weights, scores, valid_T)

    def _check_ids(self, ids_TK: Tensor) -> None:
        if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
            raise RoutingError(
                f"{self.path}: expert ids have dtype {ids_TK.dtype}; integers were expected. "
                "This model passes something else than ids to its experts."
            )
        if ids_TK.shape[-1] != self.top_k and not self.variable_top_k:
            raise RoutingError(
                f"{self.path}: {ids_TK.shape[-1]} experts per token were routed, but the model is "
                f"configured for {self.top_k}. Load it with a config that agrees with its code."
            )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _selected(weights_TE: Tensor, ids_TK: Tensor, site: RouterSite) -> Tensor:
    # Some experts take the weights of all experts, zero for those that are not selected.
    if weights_TE.shape[-1] != site.num_experts:
        raise RoutingError(
            f"{site.path}: routing weights of shape {list(weights_TE.shape)} fit neither top-k "
            f"{site.top_k} nor {site.num_experts} experts."
        )
    return weights_TE.gather(1, ids_TK.long())


def check_routing(routing: Routing, site: RouterSite) -> None:
    """Raise RoutingError where an id is neither NO_EXPERT nor in [0, num_experts).

    Reads values, so it waits for the device; for tests, and for data already on the host.
    """
    ids = routing.expert_ids_TK
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < NO_EXPERT or high >= site.num_experts:
        seen = high if high >= site.num_experts else low
        raise RoutingError(
            f"{site.path}: expert id {seen} was routed, but the layer has experts 0 to "
            f"{site.num_experts - 1}. The trace would be wrong; nothing of this pass is recorded."
        )
