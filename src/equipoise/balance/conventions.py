"""Weights of balancing losses between other frameworks' conventions and ours.

Ours is `weight` times the mean over layers of E sum_e f_e P_e with f the share of all K selections
(`objectives.switch`), 1 at perfect balance. Frameworks differ by factors of K, of the number of
layers, or of the world size, and some by more than a factor:

    convert(0.02, "transformers", top_k=8, num_layers=16)  # 0.16: theirs is K at perfect balance

A converted weight gives our loss the same router gradient as theirs has, over the same scope of f
and the same real tokens. `CONVENTIONS[name].note` says where that has limits; what a factor cannot
mend raises an error. Versions read: transformers 5.23, the others as of mid-2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from equipoise.errors import EquipoiseError, nearest

Layers = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class Setup:
    """The numbers that a factor can depend on."""

    top_k: int
    num_layers: int
    num_experts: int | None = None
    world_size: int | None = None


@dataclass(frozen=True, slots=True)
class Convention:
    """How one framework normalises its balancing loss, seen from ours."""

    layers: Layers
    """Whether the terms of the layers are added up or averaged in the loss that is trained."""
    scale: Callable[[Setup], float]
    """Our weight over theirs, for one layer."""
    note: str
    """Over what f is counted there, and where the factor has limits."""
    first_choice: Callable[[int], bool] = lambda top_k: False
    """Whether only each token's first choice is counted, at this top_k."""

    def factor(self, setup: Setup, layers: Layers | None = None) -> float:
        """Our weight over theirs."""
        summed = (layers or self.layers) == "sum"
        return self.scale(setup) * (setup.num_layers if summed else 1)


def convert(
    weight: float,
    convention: str,
    *,
    top_k: int,
    num_layers: int,
    num_experts: int | None = None,
    world_size: int | None = None,
    layers: Layers | None = None,
    first_choice: bool = False,
    back: bool = False,
) -> float:
    """Our weight for a weight of another framework; with `back`, theirs for one of ours.

    Args:
        weight: The coefficient as the other framework takes it, or ours with `back`.
        convention: One of `CONVENTIONS`.
        top_k: Experts selected per token, K.
        num_layers: MoE layers in the model, L.
        num_experts: Experts per layer, E; only "tutel_load_importance" needs it.
        world_size: Data-parallel size for "megatron_global", expert-parallel size for
            "fastmoe_gshard"; the others do not need it.
        layers: "sum" or "mean", where your loop adds up the layers' terms otherwise than usual.
        first_choice: Say True when your load counts first choices only (`expert_ids_TK[:, :1]`), as
            some of these frameworks do: without it they are refused for K > 1.
        back: Convert the other way.

    Raises:
        EquipoiseError: an unknown convention, a missing or impossible number, or a loss that no
            factor turns into ours.
    """
    known = _known(convention)
    setup = _setup(top_k, num_layers, num_experts, world_size)
    _check(weight, layers)
    if known.first_choice(top_k) != first_choice and top_k > 1:
        raise EquipoiseError(_other_count(convention, top_k, first_choice))
    factor = known.factor(setup, layers)
    return weight / factor if back else weight * factor


def _one(setup: Setup) -> float:
    return 1.0


def _per_selection(setup: Setup) -> float:
    """Counts over tokens, not over selections: K at perfect balance."""
    return float(setup.top_k)


def _once_per_rank(setup: Setup) -> float:
    return 1.0 / _needed(setup.world_size, "world_size", "the data-parallel size")


def _local_experts_squared(setup: Setup) -> float:
    return 1.0 / _needed(setup.world_size, "world_size", "the expert-parallel size") ** 2


def _half_sample_variance(setup: Setup) -> float:
    """Half of CV^2 with the variance over E - 1: E / (E - 1) times ours over E."""
    experts = _needed(setup.num_experts, "num_experts", "E, 2 or more", least=2)
    return 0.5 * experts / (experts - 1)


def _above_one(top_k: int) -> bool:
    return top_k > 1


def _two_only(top_k: int) -> bool:
    return top_k == 2


CONVENTIONS: dict[str, Convention] = {
    "equipoise": Convention("mean", _one, "Ours."),
    "transformers": Convention(
        "mean",
        _per_selection,
        "load_balancing_loss_func: f and P are averaged over all layers before they are multiplied, "
        "so layers collapsed on different experts cancel out (E of them give K, as at balance). "
        "The factor is exact for one layer, or when all layers have the same load. Rank-local "
        "micro-batch; padding leaves it only with an attention mask.",
    ),
    "megatron": Convention(
        "sum",
        _one,
        "aux_loss and seq_aux_loss. f is recounted without selection bias and groups; summed over "
        "tensor and context parallel ranks, of a micro-batch or of each sequence.",
    ),
    "megatron_global": Convention(
        "sum",
        _once_per_rank,
        "global_aux_loss: f is a running mean over the micro-batches of the data-parallel group, P "
        "is divided by the group's tokens and then averaged over ranks again, so the gradient is "
        "too small by the data-parallel size (issue 3672, read from the code, not run).",
    ),
    "deepspeed": Convention(
        "sum",
        _one,
        "top1gating, topkgating (K > 2): l_aux of each layer, which the user adds up. top2gating "
        "counts first choices only. Padding leaves f in top1gating but never P.",
        _two_only,
    ),
    "tutel": Convention(
        "sum",
        _one,
        "gshard_loss: l_aux of each layer, which the user adds up. First choices only; padding "
        "is counted.",
        _above_one,
    ),
    "tutel_load_importance": Convention(
        "sum",
        _half_sample_variance,
        "load_importance_loss: the weight for each of objectives `importance` and `load_cv` (of a "
        "smooth load), whose sum it halves; 0 at balance there, 1 for each here. Its smooth load "
        "has another threshold than Shazeer's, and one noise for all experts.",
    ),
    "megablocks": Convention(
        "mean",
        _one,
        "batched_load_balancing_loss: layers kept apart and averaged; padding is counted.",
    ),
    "olmo": Convention(
        "mean",
        _one,
        "OLMo-core's load_balancing_loss, local_batch or instance, with scale_loss_by_num_layers "
        'as by default; without it, layers="sum". Divided by the whole batch\'s tokens, so '
        "micro-batches add up to their mean.",
    ),
    "nemo": Convention(
        "sum",
        _one,
        "NeMo Automodel's Gate: over context parallel ranks of a micro-batch, padding masked; the "
        "recipe sets a further scale of the gradient, by tokens in some versions.",
    ),
    "xtuner": Convention(
        "sum",
        _one,
        "Summed over layers, averaged over micro-batches; P is of the biased scores. The global "
        "average reduces P too, which FSDP's mean of gradients undoes.",
    ),
    "deepseek_v2": Convention(
        "sum",
        _one,
        "The released gate with seq_aux: each sequence by itself, averaged over the batch.",
    ),
    "fastmoe_switch": Convention(
        "sum",
        _one,
        "Top-1. Counted after the capacity drop, f and P over the surviving tokens: with drops, "
        "theirs is the factor 1 / kept share stronger, on the load of kept tokens.",
        _above_one,
    ),
    "fastmoe_gshard": Convention(
        "sum",
        _local_experts_squared,
        "Also of the dc and faster gates: multiplied by the square of the rank's own experts "
        "instead of all, hence 1 / world_size^2 at balance. First choices only.",
        _above_one,
    ),
    "maxtext": Convention(
        "mean",
        _per_selection,
        "Each sequence by itself, averaged over batch and layers; K at perfect balance. P is the "
        "softmax of the logits even where the router takes a sigmoid.",
    ),
    "st_moe": Convention(
        "sum",
        _one,
        "st-moe-pytorch: each sequence by itself, averaged over the batch; first choices only. The "
        "user adds up the layers.",
        _above_one,
    ),
    "sonic_moe": Convention(
        "sum",
        _one,
        "Both f and P divided by their own sum, rank-local. The user adds up the layers.",
    ),
}
"""Every convention by the name that `convert` takes."""


def _known(convention: str) -> Convention:
    if convention not in CONVENTIONS:
        raise EquipoiseError(
            f"convention {convention!r} is unknown: allowed are {', '.join(CONVENTIONS)}."
            f"{nearest(convention, CONVENTIONS)}"
        )
    return CONVENTIONS[convention]


def _setup(top_k: int, num_layers: int, num_experts: int | None, world_size: int | None) -> Setup:
    for name, value in (("top_k", top_k), ("num_layers", num_layers)):
        if value < 1:
            raise EquipoiseError(f"{name} is {value}: it must be 1 or more")
    return Setup(top_k, num_layers, num_experts, world_size)


def _check(weight: float, layers: str | None) -> None:
    if not math.isfinite(weight):
        raise EquipoiseError(f"weight is {weight}: it must be a finite number")
    if layers not in (None, "sum", "mean"):
        raise EquipoiseError(
            f"layers is {layers!r}: allowed are 'sum' and 'mean', or None for the usual"
        )


def _needed(value: int | None, name: str, what: str, least: int = 1) -> int:
    if value is None or value < least:
        raise EquipoiseError(f"{name} is {value}: this convention needs it ({what})")
    return value


def _other_count(convention: str, top_k: int, first_choice: bool) -> str:
    if first_choice:
        return (
            f"{convention} counts all {top_k} choices of a token at top_k={top_k}, not the first "
            "alone: no factor converts it to a load of first choices. Leave out first_choice"
        )
    return (
        f"{convention} counts only the first of {top_k} choices of a token at top_k={top_k}: no "
        "factor converts its weight to a load of all of them. Choose a weight anew, or count "
        "first choices (expert_ids_TK[:, :1]) and say first_choice=True"
    )
