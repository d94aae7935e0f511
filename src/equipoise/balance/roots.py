"""Hooks on the model's own call: what it is called with tells which rows are tokens."""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance.book import Book
from equipoise.balance.frameworks import SWITCH, OwnTerms
from equipoise.errors import EquipoiseError
from equipoise.models import valid_tokens
from equipoise.models.steering import in_backward


class Roots:
    """Hooks on the model's own call: they take its attention mask and the shape of its batch."""

    def __init__(self, model: nn.Module, book: Book, own: OwnTerms) -> None:
        self._book, self._own = book, own
        self._open: list[ExitStack] = []
        """What each call of the root under way has to undo."""
        root = getattr(model, "module", model)
        root = getattr(root, "_orig_mod", root)
        self._own_loss = bool(getattr(getattr(root, "config", None), SWITCH, False))
        self._names = tuple(inspect.signature(root.forward).parameters)
        self._handles = [
            root.register_forward_pre_hook(self._begin, with_kwargs=True),
            root.register_forward_hook(self._end, always_call=True),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._close_from(_calls_of(root) - 1)  # torch runs no hook after a KeyboardInterrupt
        self._open.append(ExitStack())
        self._own.hide()
        self._open[-1].callback(self._own.show)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if not in_backward():
            self._take(given, args)
        if self._own_loss and SWITCH in self._names[len(args) :] and given.get(SWITCH) is None:
            return args, {**kwargs, SWITCH: False}  # its own loss would count nothing
        return None

    def _take(self, given: dict[str, Any], args: tuple[Any, ...]) -> None:
        """Take from a call what tells tokens from padding, and sequences from each other."""
        self._book.close()  # a pass before that left layers out ends here
        _check_told(self._book.told, given)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._book.batch_rows = _rows_of(given, args)
        if self._book.segments is None:
            self._book.packed = _packed(given.get("position_ids"))
        self._open[-1].enter_context(valid_tokens(mask, unless_told=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, *_: Any) -> None:
        if self._open:
            self._open.pop().close()

    def _close_from(self, depth: int) -> None:
        while len(self._open) > depth:
            with suppress(ValueError):  # the mask was set in another thread's or cell's context
                self._open.pop().close()

    def remove(self) -> None:
        """Take the hooks off, and undo what calls under way or interrupted have left."""
        for handle in self._handles:
            handle.remove()
        self._close_from(0)


def _calls_of(root: nn.Module) -> int:
    """How many calls of the root are under way on this stack, the one that asks included."""
    frame: Any = sys._getframe(1)
    count = 0
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is root:
            count += 1
        frame = frame.f_back
    return max(count, 1)  # compiled code has frames of its own


def _check_told(told: dict[str, Tensor | None], given: dict[str, Any]) -> None:
    """EquipoiseError where handle.batch() spoke of another shape than the model is called with."""
    ids = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return
    for name, tensor in told.items():
        if tensor is not None and tensor.shape != ids.shape[:2]:
            raise EquipoiseError(
                f"handle.batch({name}=...) is {list(tensor.shape)}, but the model was called with "
                f"{list(ids.shape[:2])} tokens. Give one value for each token."
            )


def _rows_of(given: dict[str, Any], args: tuple[Any, ...]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            return int(tensor.shape[0])
    first = args[0] if args else None
    return int(first.shape[0]) if isinstance(first, Tensor) and first.ndim >= 3 else None


def _packed(position_ids: Any) -> Tensor | None:
    """Sequence numbers of packed rows, from positions that start at 0 again; None if none do."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return None
    starts = position_ids == 0
    starts[:, 0] = True
    if bool((starts.sum(1) <= 1).all()):
        return None
    order: Tensor = starts.reshape(-1).cumsum(0) - 1
    return order.view_as(position_ids)
