"""The routers of recipes by name: `equipoise.nn`'s, with the options of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, nearest
from equipoise.lab.terms import Call, make, one, parse

if TYPE_CHECKING:
    from equipoise.lab.config import ModelConfig

FIXED = ("softmax", "mixtral", "sigmoid", "sqrtsoftplus")
"""Routers with a fixed number of experts per token and a selection bias, which any term can act on."""
VARIABLE = ("expert_choice", "expert_threshold", "relu")
"""Routers that give tokens different numbers of experts."""
ROUTERS = (*FIXED, "random", "sinkhorn", "base", "hash", *VARIABLE)
UNMOVED = {
    "random": "its experts are drawn at random",
    "expert_choice": "in training each of its experts takes equally many tokens",
}
"""Routers whose load no term moves, and why."""
BLOCKS = (*ROUTERS, "soft")
"""What `model.router` may name: a router, or "soft", whose layer mixes tokens and selects none."""


def check_router(model: ModelConfig, call: Call) -> None:
    """Raise EquipoiseError for a router that there is not, or that does not fit the model."""
    if call.name not in BLOCKS:
        raise EquipoiseError(
            f"No router {call.name!r}: there are {', '.join(BLOCKS)}.{nearest(call.name, BLOCKS)}"
        )
    if call.name == "base" and model.top_k != 1:
        raise EquipoiseError(
            f"model.router={call.name!r} assigns one expert to a token, but model.top_k="
            f"{model.top_k}."
        )
    if model.top_k == 1 and _weighting(call) in ("renormalized", "softmax"):
        raise EquipoiseError(
            f"model.router={str(call)!r} with model.top_k=1 makes every weight 1, so that the router "
            "gets no gradient; use weighting=scores."
        )
    if dict(call.options).get("null_experts"):
        raise EquipoiseError(
            f"model.router={str(call)!r}: the layers of this model have no null experts. Leave out "
            "null_experts."
        )
    if model.capacity != "none" and call.name in (*VARIABLE, "soft"):
        raise EquipoiseError(
            f"model.capacity={model.capacity!r} is for routers with a fixed top-k, not "
            f"model.router={call.name!r}."
        )
    _check_options(model, call)


def check_balance(balance: str, router: Call) -> None:
    """Raise EquipoiseError for balancing terms that cannot act on a router."""
    names = [call.name for call in parse(balance)]
    said = f"balance={balance!r} with model.router={str(router)!r}: "
    if names and router.name == "hash":
        raise EquipoiseError(f"{said}its experts are read from a table, which nothing balances.")
    if set(names) - {"lifecycle", "capacity", "z"} and router.name in UNMOVED:
        raise EquipoiseError(
            f"{said}{UNMOVED[router.name]}, so that no loss and no bias moves its load. Use balance=none, "
            "or another router."
        )
    if set(names) - {"lifecycle"} and router.name == "relu":
        raise EquipoiseError(
            f"{said}this router steers itself, by an L1 term with the options l1_weight and rate. No "
            "loss, no bias and no capacity acts on it; of all terms only lifecycle does. Use "
            "balance=none, or another router."
        )
    if "capacity" in names and router.name in VARIABLE:
        raise EquipoiseError(
            f"{said}a capacity is for routers with a fixed top-k. Leave it out, or use another router."
        )


def _check_options(model: ModelConfig, call: Call) -> None:
    """Refuse options that the router or the capacity does not have, before any text is read."""
    make_capacity(model)
    if call.name == "soft":
        make(call, {"soft": _soft_slots}, "router")
    elif call.options:
        import torch

        with torch.random.fork_rng(devices=[]):
            make_router(model, 1)


def _soft_slots(*, slots: int = 1) -> int:
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(f"slots={slots!r}; it has to be a whole number, at least 1")
    return slots


def soft_slots(model: ModelConfig) -> int:
    """Slots of each expert of a "soft" layer."""
    return int(make(one(model.router), {"soft": _soft_slots}, "router"))


def _weighting(call: Call) -> str:
    default = {"softmax": "renormalized", "mixtral": "softmax"}
    kept = dict(call.options).get("weighting", default.get(call.name, "scores"))
    return str(kept)


def make_router(model: ModelConfig, vocab_size: int) -> Any:
    """The router of one layer."""
    import torch

    from equipoise import nn

    shape = (model.hidden_size, model.experts, model.top_k)

    def top_k(function: str, weighting: str, **fixed: Any) -> Callable[..., Any]:
        def maker(*, precision: str = "float32", **options: Any) -> Any:
            settings = {"score_function": function, "weighting": weighting, **fixed, **options}
            for name in ("noise", "selection"):
                part = settings.get(name)
                if isinstance(part, str | Call):
                    settings[name] = make(
                        Call(part) if isinstance(part, str) else part, parts, name
                    )
            if precision not in ("float32", "bfloat16"):
                raise ValueError(f"precision={precision!r} is not one of float32, bfloat16")
            router = nn.TopKRouter(*shape, **settings)
            router.precision = getattr(torch, precision)
            return router

        maker.options_for = nn.TopKRouter  # type: ignore[attr-defined]
        return maker

    parts: dict[str, Callable[..., Any]] = {
        "learned": _with(nn.LearnedNoise, model.hidden_size, model.experts),
        "fixed": nn.FixedNoise,
        "group_limited": nn.GroupLimited,
    }
    makers: dict[str, Callable[..., Any]] = {
        "softmax": top_k("softmax", "renormalized", selection_bias=True),
        "mixtral": top_k("softmax", "softmax"),
        "sigmoid": top_k("sigmoid", "renormalized", selection_bias=True),
        "sqrtsoftplus": top_k("sqrtsoftplus", "renormalized", selection_bias=True),
        "random": top_k("softmax", "renormalized", selection=nn.Random()),
        "sinkhorn": top_k("softmax", "renormalized", selection=nn.Sinkhorn()),
        "base": top_k("sigmoid", "scores", selection=nn.Assignment()),
        "hash": lambda: nn.HashRouter(
            model.hidden_size, model.experts, nn.hash_table(vocab_size, model.experts, model.top_k)
        ),
        "expert_choice": _with(nn.ExpertChoiceRouter, *shape),
        "expert_threshold": _with(nn.ExpertThresholdRouter, *shape),
        "relu": _with(nn.ReLURouter, *shape),
    }
    return make(one(model.router), makers, "router")


def _with(made: Callable[..., Any], *shape: int) -> Callable[..., Any]:
    """`made` of this shape, its options still to come."""

    def maker(**options: Any) -> Any:
        return made(*shape, **options)

    maker.options_for = made  # type: ignore[attr-defined]
    return maker


def make_capacity(model: ModelConfig) -> Any:
    """The layer's capacity, or None."""
    if not parse(model.capacity):
        return None
    from equipoise import nn
    from equipoise.nn.capacity import check_groups

    made = make(one(model.capacity, "model.capacity"), {"capacity": nn.Capacity}, "capacity")
    try:
        check_groups(made.groups, model.experts)
    except ValueError as error:
        raise EquipoiseError(f"model.capacity={model.capacity!r}: {error}") from error
    return made
