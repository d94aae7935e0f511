"""What a step measured, as a plain dict with stable names."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from equipoise.balance.passes import KEPT, SELECTED, Statistic
from equipoise.errors import EquipoiseError
from equipoise.metrics import floors, load

if TYPE_CHECKING:
    from equipoise.balance.attach import Handle

NAMES = (
    "max_vio",
    "max_vio_floor",
    "max_vio_micro",
    "max_vio_micro_floor",
    "cv",
    "entropy",
    "dead_share",
    "dropped_share",
    "churn",
    "margin",
    "overruled_share",
    "gradient_share",
)
"""Measures of every layer; `bias_min`, `bias_max`, `bias_mean` and one per loss come with them."""


class Measures:
    """The figures of the last step; counts are of all ranks, the rest of this one."""

    def __init__(self, handle: Handle) -> None:
        # Weak, so that a handle goes with its last user, and the optimizer that it knows with it.
        self._handle = weakref.proxy(handle)
        self._flat: Tensor | None = None
        self._before: Tensor | None = None
        self._meters: dict[str, Tensor | int | dict[int, Tensor]] = {}
        self.gradient_share_L = torch.full(
            (handle.book.num_layers,), math.nan, device=handle.device
        )
        self.step = 0

    def take(self, flat: Tensor) -> None:
        """Keep a step's counts and running sums; nothing is computed before `last` is asked."""
        meters = self._handle.book.meters
        # Still of the step before, also where that one was before a checkpoint.
        self._before, self._flat = self._handle.steps.last, flat
        self._values = meters.values.clone()
        self._valued = torch.tensor(meters.valued, dtype=torch.float32).reshape(self._values.shape)
        self._micro = dict(meters.micro_vio)
        self._passes = meters.passes
        balance, main = meters.balance_sq.sqrt(), meters.main_sq.sqrt()
        share = balance / (balance + main)
        self.gradient_share_L = torch.where(share.isnan(), self.gradient_share_L, share)
        self._probes = list(meters.probes)
        self.step = self._handle.book.step
        meters.reset()

    def steering(self, measure: str) -> Tensor:
        """A measure of the last step for every layer [L], for a controller of a loss weight."""
        if measure == "max_vio":
            return torch.tensor([float(load.max_vio(c)) for c in self._counts()])
        if measure == "dropped_share":
            return torch.tensor(self._dropped())
        raise EquipoiseError(f"no measure {measure!r} to steer by: max_vio, dropped_share.")

    def last(self) -> dict[str, float]:
        """balance/<measure> (mean over layers) and balance/layer_<n>/<measure>, {} before a step."""
        if self._flat is None:
            return {}
        rows = self._rows()
        names = self._layer_names()
        out: dict[str, float] = {"balance/step": float(self.step)}
        for measure, values in rows.items():
            known = [v for v in values if not math.isnan(v)]
            if known:
                out[f"balance/{measure}"] = float(np.mean(known))
        for index, name in enumerate(names):
            for measure, values in rows.items():
                if not math.isnan(values[index]):
                    out[f"balance/{name}/{measure}"] = values[index]
        for part in self._handle.parts:
            out.update(part.metrics())
        return out

    def _rows(self) -> dict[str, list[float]]:
        counts = self._counts()
        sites = self._handle.sites
        tokens = self._tokens()
        passes = max(self._passes, 1)
        ranks = self._handle.book.ranks
        rows: dict[str, list[float]] = {
            "max_vio": [float(load.max_vio(c)) for c in counts],
            "max_vio_floor": [
                _floor(t, s.num_experts, s.top_k) for t, s in zip(tokens, sites, strict=True)
            ],
            "max_vio_micro": self._by_layer(self._micro, passes),
            "max_vio_micro_floor": [
                _floor(t / passes / ranks, s.num_experts, s.top_k)
                for t, s in zip(tokens, sites, strict=True)
            ],
            "cv": [float(load.cv(c)) for c in counts],
            "entropy": [float(load.entropy(c)) for c in counts],
            "dead_share": [float((c == 0).mean()) for c in counts],
            "dropped_share": self._dropped(),
            "churn": self._churn(counts),
        }
        probed = [_probed(p, s.top_k) for p, s in zip(self._probes, sites, strict=True)]
        rows["margin"] = [margin for margin, _ in probed]
        rows["overruled_share"] = [overruled for _, overruled in probed]
        rows["gradient_share"] = self.gradient_share_L.cpu().tolist()
        for term, loss in enumerate(self._handle.book.losses):
            value = self._values[term].cpu() / self._valued[term]
            rows[f"loss/{loss.name}"] = value.tolist()
        biases = self._handle.biases
        if biases:
            held = [bias.read().cpu() for bias in biases]
            rows["bias_min"] = [float(b.min()) for b in held]
            rows["bias_max"] = [float(b.max()) for b in held]
            rows["bias_mean"] = [float(b.mean()) for b in held]
        return rows

    def _table(self, flat: Tensor, statistic: Statistic = SELECTED) -> list[np.ndarray]:
        layout = self._handle.book.layout
        tables = [layout.counts(flat, statistic, b.index).cpu().numpy() for b in layout.banks]
        return [tables[layer.bank][layer.row] for layer in self._handle.layers]

    def _counts(self) -> list[np.ndarray]:
        assert self._flat is not None
        return self._table(self._flat)

    def _tokens(self) -> list[float]:
        assert self._flat is not None
        layout = self._handle.book.layout
        tables = [layout.tokens(self._flat, b.index).cpu() for b in layout.banks]
        return [float(tables[layer.bank][layer.row]) for layer in self._handle.layers]

    def _dropped(self) -> list[float]:
        """Slots that went to no expert, as a share of all slots of valid tokens."""
        out = []
        assert self._flat is not None
        left = KEPT if KEPT in self._handle.book.layout.statistics else SELECTED
        kept = self._table(self._flat, left)
        for c, t, s in zip(kept, self._tokens(), self._handle.sites, strict=True):
            out.append(1 - float(c.sum()) / (t * s.top_k) if t else math.nan)
        return out

    def _churn(self, counts: list[np.ndarray]) -> list[float]:
        """The share of the load that lies with other experts than in the step before."""
        if self._before is None:
            return [math.nan] * len(counts)
        before = self._table(self._before)
        return [
            float(np.abs(_share(now) - _share(then)).sum() / 2)
            for now, then in zip(counts, before, strict=True)
        ]

    def _by_layer(self, by_bank: dict[int, Tensor], passes: int) -> list[float]:
        held = {bank: (table / passes).cpu() for bank, table in by_bank.items()}
        return [float(held[layer.bank][layer.row]) for layer in self._handle.layers]

    def _layer_names(self) -> list[str]:
        sites = self._handle.sites
        numbers = [site.layer for site in sites]
        if len(set(numbers)) == len(numbers):
            return [f"layer_{number}" for number in numbers]
        return [site.path for site in sites]


def _probed(probe: tuple[Tensor, Tensor] | None, top_k: int) -> tuple[float, float]:
    """k-th minus (k+1)-th score, mean over rows; selections that bias or groups overruled."""
    if probe is None or not len(probe[0]):
        return math.nan, math.nan
    scores_TE, ids_TK = probe
    best = scores_TE.float().topk(min(top_k + 1, scores_TE.shape[1]), dim=-1)
    margin = (best.values[:, top_k - 1] - best.values[:, -1]).mean()
    kept = (ids_TK.unsqueeze(2) == best.indices[:, :top_k].unsqueeze(1)).any(2)
    routed = ids_TK >= 0
    return float(margin), float((routed & ~kept).sum() / routed.sum().clamp(min=1))


def _share(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / max(counts.sum(), 1e-300))


def _floor(tokens: float, experts: int, top_k: int) -> float:
    """MaxVio by chance alone; tokens are rounded to a few per cent, so that floors are simulated once."""
    if tokens < 1:
        return math.nan
    rounded = round(2 ** (round(math.log2(tokens) * 8) / 8))
    return float(floors.floor(max(rounded, 1), experts, top_k).mean["max_vio"])
