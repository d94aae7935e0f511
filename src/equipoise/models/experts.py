"""The generic route: experts modules whose forward takes the ids and weights of the selection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.models import describe
from equipoise.models.scan import Scan, split
from equipoise.models.sites import Interpreter, RouterSite
from equipoise.models.taps import Ears, Hear
from equipoise.routing import NO_EXPERT

_IDS = ("top_k_index", "router_indices")
_WEIGHTS = ("top_k_weights", "routing_weights")


def argument_names(module: nn.Module) -> tuple[str, str] | None:
    """Names under which a module's forward takes expert ids and weights, if it takes both."""
    names = forward_arguments(module)
    ids = next((name for name in _IDS if name in names), None)
    weights = next((name for name in _WEIGHTS if name in names), None)
    return (ids, weights) if ids and weights else None


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without self, as its class declares them."""
    kind: Any = type(module)
    return _forward_arguments(kind)


@cache
def _forward_arguments(kind: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def block_path(scan: Scan, path: str) -> str:
    """The path that names a site: the block around the experts, unless that is a whole layer."""
    above, _ = scan.parent(path)
    return path if above.rpartition(".")[2].isdigit() or not above else above


def site(scan: Scan, path: str, module: nn.Module, null_experts: int = 0) -> RouterSite:
    """The router site in front of an experts module."""
    router = scan.router_beside(path)
    stated = getattr(module, "null_experts", 0)
    null_experts = null_experts or (stated if isinstance(stated, int) else 0)
    num_experts = describe.num_experts(module, scan.config_of(path), path)
    heard = describe_site(
        scan, path, module, router, ears(module, router, num_experts + null_experts)
    )
    heard.null_experts = null_experts
    if null_experts:
        heard.interpret = beyond(num_experts)
    return heard


def beyond(num_experts: int) -> Interpreter:
    """Ids from `num_experts` up are choices that compute nothing."""

    def computing(ids: Tensor, _: Tensor | None) -> Tensor:
        return ids.masked_fill(ids >= num_experts, NO_EXPERT)

    return computing


def describe_site(
    scan: Scan,
    path: str,
    module: nn.Module,
    router: nn.Module | None,
    ears: Ears,
    *,
    block: str | None = None,
    top_k: int | None = None,
    num_experts: int | None = None,
) -> RouterSite:
    """A site heard at the module at `path`, in the block around it unless another is named."""
    around = scan.modules[block if block is not None else path.rpartition(".")[0]]
    config = scan.config_of(path)
    stack, layer = split(path)
    return RouterSite(
        layer=layer,
        path=block_path(scan, path) if block is None else block,
        stack=stack,
        num_experts=num_experts or describe.num_experts(module, config, path),
        top_k=top_k or describe.top_k([m for m in (router, around) if m is not None], config, path),
        score_function=describe.score_function(router, around, config),
        selection_bias=describe.selection_bias(router, around),
        shared_experts=describe.shared_experts(scan, path, config),
        family=scan.family,
        scores_are=describe.scores_are(router),
        compares=describe.compares(router),
        variable_top_k=bool(getattr(router, "variable_top_k", False)),
        selects_in_block=describe.selects_in_block(router),
        module=module,
        ears=ears,
    )


def ears(
    experts: nn.Module,
    router: nn.Module | None,
    width: int,
    arguments: tuple[str, str] | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
) -> Ears:
    """Hooks that hear ids and weights at the experts, scores [T, width] at the router.

    `arguments` names what forward calls ids and weights; `read` makes ids of something else.
    """
    names = forward_arguments(experts)
    ids_name, weights_name = arguments or argument_names(experts) or ("", "")
    ids_at, weights_at = names.index(ids_name), names.index(weights_name)

    def install(hear: Hear, scores: bool) -> list[RemovableHandle]:
        heard: list[Tensor | None] = [None]

        def at_router(_: nn.Module, __: Any, output: Any) -> None:
            heard[0] = scores_in(output, width)

        def at_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids = kwargs[ids_name] if ids_name in kwargs else args[ids_at]
            weights = kwargs[weights_name] if weights_name in kwargs else args[weights_at]
            found, heard[0] = heard[0], None
            chosen = ids if read is None else read(ids)
            used, carried = hear(chosen, weights, found)
            if used is chosen and carried is weights:
                return None
            changed: dict[str, tuple[int, Any]] = {}
            if used is not chosen:
                changed[ids_name] = (ids_at, used)
            changed[weights_name] = (weights_at, carried)
            return with_changed(args, kwargs, changed)

        handles = [experts.register_forward_pre_hook(at_experts, with_kwargs=True)]
        if router is not None and scores:
            handles.append(router.register_forward_hook(at_router))
        return handles

    return install


def with_changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], changed: dict[str, tuple[int, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with some of them replaced, wherever they were given."""
    listed, named = list(args), dict(kwargs)
    for name, (at, value) in changed.items():
        if name in named:
            named[name] = value
        else:
            listed[at] = value
    return tuple(listed), named


def scores_in(output: Any, width: int) -> Tensor | None:
    """The first floating tensor with `width` columns that a router returned."""
    for tensor in output if isinstance(output, list | tuple) else (output,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] == width:
            return tensor
    return None
