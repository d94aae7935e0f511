"""What the cost line says for N devices: the busiest device's load, of profiles and of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.lab.cost import figures
from equipoise.lab.cost.model import busiest, busiest_by_chance, one_hot
from equipoise.lab.experiments import collapse
from equipoise.lab.experiments.base import Page, number
from equipoise.lab.results import Result
from equipoise.metrics import floors, load

DEVICES = (2, 4, 8, 16, 32, 64)
EXPERTS = 64
HOT = (1.0, 4.0, 16.0)
"""MaxVio of imposed loads."""
RUNS = ("no balancing", "Switch loss 0.01", "4 x the experts")
"""Of experiment `collapse`, CPU tier: whose loads are taken where they are finished."""


@dataclass(frozen=True)
class Load:
    """The load of one source, and what it puts on the busiest of N devices."""

    name: str
    max_vio: float
    ratios: dict[int, float]
    """Fair shares by number of devices, where they divide the experts."""


def loads(runs: Path) -> list[Load]:
    """Imposed loads of 64 experts; then those of finished runs in this folder, with chance."""
    found = []
    for max_vio in HOT:
        ratios_E = one_hot(max_vio, EXPERTS)
        by_devices = {n: float(busiest(ratios_E, n)) for n in _fitting(EXPERTS)}
        found.append(Load(f"one hot of {EXPERTS}", max_vio, by_devices))
    shapes = set()
    for config in collapse.configs("cpu", 1):
        result = Result.find(runs, config)
        if config.name in RUNS and result is not None:
            found.append(_measured(result))
            shapes.add((config.step_tokens, config.model.experts, config.model.top_k))
    return found + [_chance(*shape) for shape in sorted(shapes)]


def _fitting(experts: int) -> list[int]:
    return [n for n in DEVICES if experts % n == 0]


def _measured(result: Result) -> Load:
    """Mean over the layers and steps of the last tenth: each layer waits for its own busiest."""
    counts = result.counts[-max(1, len(result.counts) // 10) :]
    by_devices = {n: float(busiest(counts, n).mean()) for n in _fitting(counts.shape[-1])}
    name = f"run “{result.config.name}”, {counts.shape[-1]} experts"
    return Load(name, float(load.max_vio(counts).mean()), by_devices)


def _chance(tokens: int, experts: int, top_k: int) -> Load:
    by_devices = {n: busiest_by_chance(tokens, experts, top_k, n) for n in _fitting(experts)}
    name = f"chance, {experts} experts, top-{top_k}"
    return Load(name, floors.floor(tokens, experts, top_k).mean["max_vio"], by_devices)


def write(page: Page, share: tuple[float, float, float]) -> None:
    """The table and the figure of N devices; `share` of a balanced step scales with the load."""
    found = loads(page.runs)
    page.heading("N devices")
    page.text(
        f"""A layer ends when its busiest device does, so that a step of N devices, each with the same
        number of tokens, takes 1 + {share[0]:.2f} (load - 1) times that of balance, with the busiest
        device's load in fair shares, the experts placed in order, E / N on each. It is fitted for two
        devices, and for more it is arithmetic, not measured. The interval of the factor is
        {share[1]:.2f} to {share[2]:.2f}; were experts all of a step, it would be 1."""
    )
    page.table(
        ("load", "MaxVio of the experts", *(f"N = {n}" for n in DEVICES)),
        [_row(entry, share) for entry in found],
    )
    text = """Each cell: load of the busiest device, then times the balanced step. A dash: the devices
    do not divide the experts."""
    names = [config.name for config in collapse.configs("cpu", 1) if config.name in RUNS]
    missing = [n for n in names if not any(f"“{n}”" in entry.name for entry in found)]
    if len(missing) < len(names):
        text += """ Runs are those of [collapse](collapse.md): selections of a whole step of the last
        tenth of training, mean over steps and layers. The step's micro-batches, which are dispatched
        one by one, are loaded less evenly, and with more devices a step has more tokens, and chance
        less of a part."""
    if missing:
        text += f" Not finished here: {', '.join(missing)}."
    page.text(text)
    page.figure("devices", _CAPTION, lambda path: figures.draw_devices(found, share[0], path))


_CAPTION = """What the line says for N devices: times the step of balance, from the load of the busiest
device, without the intervals of the table (not measured beyond two)."""


def _row(entry: Load, share: tuple[float, float, float]) -> tuple[str, ...]:
    cells = []
    for n in DEVICES:
        if n not in entry.ratios:
            cells.append("–")
            continue
        times, low, high = (1 + part * (entry.ratios[n] - 1) for part in share)
        cells.append(f"{entry.ratios[n]:.1f} → {times:.1f} [{low:.1f}, {high:.1f}]")
    return (entry.name, number(entry.max_vio), *cells)
