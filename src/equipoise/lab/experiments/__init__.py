"""Published claims about balance, as runs that anyone can repeat; one module each."""

from __future__ import annotations

from equipoise.lab.experiments import collapse, cost, frontier, loss_free, recipe, remedies, scope
from equipoise.lab.experiments.base import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (collapse, loss_free, scope, frontier, recipe, cost, remedies)
}
"""By name."""
