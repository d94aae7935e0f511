"""What each selected expert gives by itself, for objectives of the experts' outputs.

Experts hand out the weighted sum over a token's slots. A hook runs them a second time, every slot a
row of its own with weight 1, and carries the gradient of these rows beside that of the sum.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from equipoise.balance.passes import Record
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite
from equipoise.models.experts import argument_names, forward_arguments, with_changed
from equipoise.models.steering import with_autograd
from equipoise.nn.parallel import ParallelExperts

if TYPE_CHECKING:
    from equipoise.balance.layers import Layer


def refuse_without_outputs(site: RouterSite, name: str) -> None:
    """EquipoiseError where the outputs of single experts are not to be had."""
    reason = _reason(site)
    if reason:
        raise EquipoiseError(
            f"{site.path} ({site.family}): Loss({name!r}) compares the outputs of a token's experts, "
            f"but {reason}. Leave the layer out with layers=."
        )


def _reason(site: RouterSite) -> str:
    kind = type(site.module).__name__
    if argument_names(site.module) is None:
        return f"{kind} is not called with ids and weights, so no single slot can be run"
    if site.variable_top_k:
        return "its router gives tokens any number of experts"
    if site.top_k < 2:
        return "its tokens have one expert each"
    if site.null_experts:
        return f"{site.null_experts} of its choices compute nothing"
    if isinstance(site.module, ParallelExperts):
        return "its experts are spread over processes, which each sum up their gradient"
    return ""


class Call:
    """How one experts module is called, and what it is to be called with for single slots."""

    def __init__(self, module: nn.Module) -> None:
        names = argument_names(module)
        assert names is not None
        listed = forward_arguments(module)
        self.module = module
        self._places = tuple((name, listed.index(name)) for name in (listed[0], *names))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Hidden states [T, D], ids [T, K] and weights [T, K] of a call."""
        found = [kwargs[name] if name in kwargs else args[at] for name, at in self._places]
        return tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in found)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: tuple[Tensor, ...]
    ) -> Tensor:
        """The module's output [R, D] for other hidden states, ids and weights, without its hooks."""
        changed = {name: (at, row) for (name, at), row in zip(self._places, rows, strict=True)}
        args, kwargs = with_changed(args, kwargs, changed)
        output: Tensor = self.module.forward(*args, **kwargs)
        return output.reshape(len(rows[0]), -1)


class SlotOutputs:
    """The hook on the experts of one layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._call = layer, Call(layer.site.module)
        self._key = next(_KEYS)
        _LAYERS[self._key] = layer
        # First among the hooks: FSDP2 lets go of the experts' whole weights in one of its own.
        self._handle: RemovableHandle = layer.site.module.register_forward_hook(
            self._after, with_kwargs=True, prepend=True
        )

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        # Also in passes that are run again: checkpointing wants to find the same tensors saved.
        if not (torch.is_grad_enabled() and module.training):
            return None
        outputs_TKD = self._outputs(args, kwargs)
        carried: Tensor
        if torch.compiler.is_compiling():
            carried, _ = torch.ops.equipoise.carry_outputs(self._key, output, outputs_TKD)
        else:
            layer = self._layer
            carried = _Carry.apply(output, outputs_TKD, layer, layer.record)  # type: ignore[no-untyped-call]
        return carried

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden_TD, ids_TK, weights_TK = self._call.given(args, kwargs)
        tokens, top_k = ids_TK.shape
        one_TK = (weights_TK != 0).to(weights_TK.dtype)  # 0 where a capacity dropped the slot
        rows = (
            hidden_TD.repeat_interleave(top_k, dim=0),
            ids_TK.reshape(-1, 1),
            one_TK.reshape(-1, 1),
        )
        return self._call.run(args, kwargs, rows).view(tokens, top_k, -1)


class _Carry(torch.autograd.Function):
    """The identity on the experts' output, whose backward gives the slots' outputs their gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, outputs_TKD: Tensor, layer: Layer, record: Any) -> Tensor:
        # A plain attribute, not a saved tensor: it stays that of the first forward pass when
        # checkpointing computes the saved ones again.
        ctx.layer, ctx.record = layer, record
        ctx.save_for_backward(outputs_TKD)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (outputs_TKD,) = ctx.saved_tensors
        return grad, ctx.layer.output_gradient(ctx.record, outputs_TKD), None, None


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_RECORDS: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


# The same in compiled code: operators that the compiler can neither look into nor leave out.
@torch.library.custom_op("equipoise::carry_outputs", mutates_args=())
def _carry_outputs(key: int, output: Tensor, outputs_TKD: Tensor) -> tuple[Tensor, Tensor]:
    layer, token = _LAYERS.get(key), -1
    if layer is not None and layer.record is not None:
        token = id(layer.record)
        _RECORDS[token] = layer.record
    return output.clone(), torch.tensor(token, dtype=torch.int64)


@_carry_outputs.register_fake
def _(key: int, output: Tensor, outputs_TKD: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("equipoise::carry_outputs_gradient", mutates_args=())
def _carry_outputs_gradient(
    key: int, token: Tensor, outputs_TKD: Tensor, arriving: Tensor
) -> Tensor:
    # `arriving` is there to be waited for: see steering.py.
    layer, record = _LAYERS.get(key), _RECORDS.pop(int(token), None)
    with with_autograd():
        found = None if layer is None else layer.output_gradient(record, outputs_TKD)
    return torch.zeros_like(outputs_TKD) if found is None else found.contiguous()


@_carry_outputs_gradient.register_fake
def _(key: int, token: Tensor, outputs_TKD: Tensor, arriving: Tensor) -> Tensor:
    return torch.empty_like(outputs_TKD, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.key = inputs[0]
    ctx.save_for_backward(output[1], inputs[2])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    token, outputs_TKD = ctx.saved_tensors
    found = torch.ops.equipoise.carry_outputs_gradient(ctx.key, token, outputs_TKD, grad)
    return None, grad, found


_carry_outputs.register_autograd(_backward, setup_context=_setup)


class SlotBySlot:
    """The same outputs in another way, for `handle.check()`: one run of the experts for each slot."""

    def __init__(self, site: RouterSite) -> None:
        self._call = Call(site.module)
        self.outputs_TKD: Tensor | None = None
        """Of the last pass, with its graph."""
        self._handle = site.module.register_forward_hook(self._after, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _after(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor
    ) -> None:
        hidden_TD, ids_TK, weights_TK = self._call.given(args, kwargs)
        found = []
        for k in range(ids_TK.shape[1]):
            slot = slice(k, k + 1)
            weights_T1 = (weights_TK[:, slot] != 0).to(weights_TK.dtype)
            found.append(self._call.run(args, kwargs, (hidden_TD, ids_TK[:, slot], weights_T1)))
        self.outputs_TKD = torch.stack(found, dim=1)
