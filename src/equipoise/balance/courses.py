"""The life cycles of all layers at work: each step's counts in, revived and frozen experts out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.balance import experts
from equipoise.balance.biases import LayerBias
from equipoise.balance.course import ASLEEP, AWAKE, RESERVE, RETIRED, Course
from equipoise.balance.lifecycle import Event, Lifecycle
from equipoise.balance.terms import Bias
from equipoise.errors import EquipoiseError
from equipoise.models import RouterSite


class Courses:
    """The life cycles of all layers of a handle; implements `parts.Part`."""

    name = "lifecycle"

    def __init__(
        self,
        term: Lifecycle,
        sites: Sequence[RouterSite],
        holders: Sequence[Sequence[nn.Module]],
        routers: Sequence[nn.Module],
        bias: Bias | None,
    ) -> None:
        self.term = term
        if term.takes_out and bias is not None:
            _check_controller(bias.controller)
        unknown = {*term.freeze, *term.retire} - {site.layer for site in sites}
        if unknown:
            raise EquipoiseError(f"Lifecycle: there is no MoE layer {sorted(unknown)[0]} here.")
        self.layers = [
            Course(site, near, router, term)
            for site, near, router in zip(sites, holders, routers, strict=True)
        ]
        self.events: list[Event] = []
        self._step = -1
        self.optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None

    def begin(
        self, biases: Sequence[LayerBias], optimizer: Callable[[], torch.optim.Optimizer | None]
    ) -> None:
        """The biases are in place: take out who was named."""
        self.optimizer = optimizer
        for index, layer in enumerate(self.layers):
            layer.bias = biases[index] if biases else None
            layer.begin(self._teller(layer, 0))

    def _teller(self, layer: Course, step: int) -> Any:
        def say(expert: int, what: str, donor: int | None = None) -> None:
            site = layer.site
            self.events.append(Event(step, site.layer, site.path, expert, what, donor))

        return say

    def before(self) -> None:
        """Let controllers see finite biases."""
        for layer in self.layers:
            layer.lift()

    def after(self, counts: list[Tensor], step: int) -> None:
        """One step of every life; a layer without any selection waits."""
        self._step = step
        widths = [len(counts_E) for counts_E in counts]
        on_host = torch.cat([counts_E.to(counts[0].device) for counts_E in counts]).cpu()
        for index, counts_E in enumerate(torch.split(on_host, widths)):
            layer = self.layers[index]
            if bool(counts_E.any()):
                layer.lift()
                layer.step(counts_E, self._reviver(index, step), self._teller(layer, step))
            layer.put_out()

    def _reviver(self, index: int, step: int) -> Callable[[int, int], None]:
        def revive(expert: int, donor: int) -> None:
            layer, term = self.layers[index], self.term
            optimizer = self.optimizer()
            experts.check_optimizer([*layer.rows, *layer.router_rows], optimizer)
            assert optimizer is not None
            generator = _generator(term.seed, step, index, expert)
            for rows in layer.rows:
                experts.copy_row(rows[expert], rows[donor], term.noise, generator)
            for rows in layer.router_rows:
                if term.router == "fresh" and rows[expert].parameter.ndim == 2:
                    _fresh(rows, expert, generator)
                else:
                    experts.copy_row(rows[expert], rows[donor], term.noise, generator)
            for rows in (*layer.rows, *layer.router_rows):
                experts.copy_moments(rows[expert], rows[donor], optimizer, term.moments)

        return revive

    def forget(self) -> None:
        """Nothing is gathered within a step."""

    def metrics(self) -> dict[str, float]:
        """Events of the last step, and how many experts are out now."""
        now = [event.what for event in self.events if event.step == self._step]
        phases = torch.cat([layer.phase_E for layer in self.layers])
        return {
            "balance/revived": float(now.count("revived")),
            "balance/woken": float(now.count("woken")),
            "balance/frozen": float((phases == ASLEEP).sum()),
            "balance/retired": float((phases == RETIRED).sum()),
            **({"balance/reserve": float((phases == RESERVE).sum())} if self.term.reserve else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Phases and counters of every layer, and the events."""
        return {
            "layers": [{n: getattr(x, n).clone() for n in Course.STATE} for x in self.layers],
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the biases have been put in place before."""
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            for name in saved.keys() & set(Course.STATE):  # older ones know of no reserve
                setattr(layer, name, saved[name].clone())
            layer.put_out()
        self.events[:] = [Event(**event) for event in state["events"]]

    def detach(self) -> None:
        """The frozen and the reserve can be selected again, the retired stay out."""
        for layer in self.layers:
            layer.phase_E[layer.phase_E == RETIRED] = AWAKE
            layer.lift()


def _generator(*numbers: int) -> torch.Generator:
    """The same random numbers on every rank and machine for the same numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _fresh(rows: experts.Rows, expert: int, generator: torch.Generator) -> None:
    """A random row as long as the layer's rows are in the root mean square."""
    row = rows[expert]
    weight_ED = row.parameter.data
    length = weight_ED[: len(rows)].float().square().mean().sqrt()
    drawn = torch.randn(row.of(weight_ED).shape, generator=generator).to(weight_ED.device)
    row.of(weight_ED).copy_(drawn * length)
    experts.clear_gradient(row)


def _check_controller(controller: Any) -> None:
    name = type(controller).__name__
    if hasattr(controller, "observe"):
        raise EquipoiseError(
            f"Lifecycle: {name} sets the bias from scores and would undo what takes experts out. "
            "Use another controller, or Lifecycle(dead='revive') without freeze, retire, attempts."
        )
    if getattr(controller, "acts", "add") != "add":
        raise EquipoiseError(
            f"Lifecycle: {name} multiplies scores, and no factor takes an expert out. Use a "
            "controller that adds."
        )
