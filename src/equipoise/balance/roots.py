"""Hooks on the model's own call: what it is called with tells which rows are tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance.book import Book
from equipoise.balance.frameworks import SWITCH
from equipoise.errors import EquipoiseError
from equipoise.models import valid_tokens
from equipoise.models.steering import in_backward


class Roots:
    """Hooks on the model's own call: they take its attention mask and the shape of its batch."""

    def __init__(self, model: nn.Module, book: Book) -> None:
        self._book = book
        self._open: list[Any] = []
        root = getattr(model, "module", model)
        root = getattr(root, "_orig_mod", root)
        self._own_loss = bool(getattr(getattr(root, "config", None), SWITCH, False))
        self._names = tuple(inspect.signature(root.forward).parameters)
        self._handles = [
            root.register_forward_pre_hook(self._begin, with_kwargs=True),
            root.register_forward_hook(self._end, always_call=True),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._book.close()  # a pass before that left layers out ends here
        _check_told(self._book.told, given)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._book.batch_rows = _rows_of(given, args)
        if self._book.segments is None:
            self._book.packed = _packed(given.get("position_ids"))
        context = valid_tokens(mask, unless_told=True)
        context.__enter__()
        self._open.append(context)
        if self._own_loss and SWITCH in self._names and given.get(SWITCH) is None:
            return args, {**kwargs, SWITCH: False}  # its own loss would count nothing
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, *_: Any) -> None:
        if self._open and not in_backward():
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


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
