"""What imbalance costs: imposed loads, the line over them, and the page."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError
from equipoise.lab import Config, pages
from equipoise.lab.cost import lines, timing
from equipoise.lab.cost.imposed import Imposed, counts_of, impose, profiles
from equipoise.lab.cost.model import (
    Line,
    busiest,
    busiest_by_chance,
    device_loads,
    interval,
    one_hot,
)
from equipoise.lab.cost.points import Points, Sizes
from equipoise.lab.experiments import EXPERIMENTS, cost, cost_devices
from equipoise.lab.meter import Meter
from equipoise.lab.model import LanguageModel
from equipoise.metrics import load
from tests.lab.made_up import SMALL

SHAPES = ((16, 2), (64, 6), (8, 2))


def small(**values: Any) -> Config:
    """A model of 8 experts, and steps of 2 x 16 tokens on each process."""
    shape = {"model.experts": 8, "model.layers": 3, "model.dense_layers": 1}
    return Config().change(
        {**SMALL, **shape, "batch_rows": 4, "model.router": "random", "expert_parallel": True}
        | values
    )


# -- imposed loads --------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
def test_profiles_set_the_load_of_the_device_and_of_the_experts_apart(
    experts: int, top_k: int
) -> None:
    found = profiles(experts, top_k)
    assert len(found) == 10
    for name, ratios_E in found.items():
        Imposed(ratios_E).check(experts, top_k)
        share = float(name.partition(" ")[0]) / 100
        assert sum(ratios_E[: experts // 2]) == pytest.approx(share * experts)
        even = max(2 * share, 2 - 2 * share)
        wanted = even if name.endswith("even") else 0.875 * experts / top_k
        assert max(ratios_E) == pytest.approx(wanted)


@given(st.integers(1, 40), st.integers(1, 4), st.data())
def test_counts_are_the_profile_s_to_within_one(tokens: int, top_k: int, data: Any) -> None:
    experts = data.draw(st.integers(top_k, 12))
    weights = np.array(data.draw(st.lists(st.floats(0, 1), min_size=experts, max_size=experts)))
    shares = np.full(experts, 1 / experts) if weights.sum() == 0 else weights / weights.sum()
    # Half even, so that none is above what its tokens allow by far.
    ratios = experts * (shares + 1 / experts) / 2
    if ratios.max() > experts / top_k:
        ratios = np.ones(experts)
    counts = counts_of(tuple(ratios), tokens, top_k)
    assert counts.sum() == tokens * top_k
    assert counts.max() <= tokens
    assert (abs(counts - ratios * tokens * top_k / experts) <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", profiles(16, 2))
def test_a_model_selects_what_is_imposed(name: str) -> None:
    config = small(**{"model.experts": 16})
    torch.manual_seed(0)
    model = LanguageModel(config.model, 50)
    ratios_E = profiles(16, 2)[name]
    impose(model, ratios_E)
    seen: list[torch.Tensor] = []
    gate = next(model.moe_layers()).gate
    gate.register_forward_hook(lambda *passed: seen.append(passed[2][2]))
    ids = torch.randint(50, (2, 16))
    with Meter(model) as meter:
        model(ids, ids).backward()
        counts_LE = meter.take().counts_LE
    wanted = torch.from_numpy(counts_of(ratios_E, 32, 2))
    assert (counts_LE == wanted).all()
    assert counts_LE.shape[0] == 2
    assert all(len(set(row)) == 2 for row in seen[0].tolist())
    assert gate.weight.grad is not None


@pytest.mark.parametrize(
    ("ratios", "said"),
    [((1.0, 1.0), "2 ratios"), ((3.0, 1.0, 0.0, 0.0), "allowed are 0 to 2"), ((1, 1, 1), "sum 3")],
)
def test_a_profile_that_cannot_be_is_refused(ratios: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Imposed(ratios).check(4, 2)


def test_profiles_take_room_for_a_hot_expert() -> None:
    with pytest.raises(ValueError, match="top-2 or more"):
        profiles(16, 1)


# -- the model ------------------------------------------------------------------------------------


def naive_busiest(counts: list[float], devices: int) -> float:
    size = len(counts) // devices
    sums = [sum(counts[d * size : (d + 1) * size]) for d in range(devices)]
    return max(sums) / (sum(counts) / devices)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 12])
def test_the_busiest_device_is_that_of_a_loop(devices: int) -> None:
    counts_LE = np.random.default_rng(devices).integers(1, 50, (5, 12))
    wanted = [naive_busiest(row, devices) for row in counts_LE.tolist()]
    assert busiest(counts_LE, devices) == pytest.approx(wanted)
    assert device_loads(counts_LE, devices).sum(-1).tolist() == counts_LE.sum(-1).tolist()


def test_with_one_expert_a_device_the_busiest_is_max_vio() -> None:
    counts_LE = np.random.default_rng(1).integers(0, 50, (3, 8))
    assert busiest(counts_LE, 8) == pytest.approx(1 + load.max_vio(counts_LE))


def test_devices_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(EquipoiseError, match="devices=3 cannot hold equal parts of 8 experts"):
        busiest(np.ones(8), 3)


@pytest.mark.parametrize("max_vio", [0.0, 1.0, 5.5, 7.0])
def test_one_hot_expert_has_the_max_vio_asked_for(max_vio: float) -> None:
    ratios_E = one_hot(max_vio, 8)
    assert ratios_E.mean() == pytest.approx(1)
    assert load.max_vio(ratios_E) == pytest.approx(max_vio)
    assert ratios_E.min() >= 0


def test_chance_is_that_of_drawn_tokens() -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(400):
        ids = np.array([rng.permutation(8)[:2] for _ in range(32)])
        found.append(naive_busiest(np.bincount(ids.ravel(), minlength=8).tolist(), 4))
    error = np.std(found) / 20
    assert abs(busiest_by_chance(32, 8, 2, 4) - np.mean(found)) < 4 * error


def test_the_line_finds_what_points_were_made_of() -> None:
    x = [1000.0, 1500.0, 2000.0]
    line = Line.fit(x, [0.2 + 3e-4 * value for value in x])
    assert (line.base, line.slope) == pytest.approx((0.2, 3e-4))
    assert line.at(8000.0) == pytest.approx(0.2 + 2.4)
    with pytest.raises(EquipoiseError, match="two different loads"):
        Line.fit([1.0, 1.0], [2.0, 3.0])


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(10, 1, 6), rng.normal(10, 1, 600)
    for values in (few, many):
        middle, low, high = interval(values)
        assert low <= middle == np.median(values) <= high
        assert interval(values) == (middle, low, high)
    assert np.ptp(interval(many)[1:]) < np.ptp(interval(few)[1:]) / 3


def test_intervals_of_a_median_hold_the_true_one_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        _, low, high = interval(rng.normal(0, 1, 12))
        held += low <= 0 <= high
    assert held >= 51


def test_the_peak_is_the_highest_sum_in_time_order() -> None:
    assert timing.highest([(3, -5), (1, 5), (2, 7), (9, 4)]) == 12
    assert timing.highest([(1, -5)]) == 0
    assert timing.highest([]) == 0


# -- measuring ------------------------------------------------------------------------------------


def naive_sent(config: Config, counts_E: np.ndarray) -> int:
    """Bytes that each of two processes sends the other in a step, row by row."""
    half = config.model.experts // 2
    away, here = int(counts_E[half:].sum()), int(counts_E[:half].sum())
    row, number, layers = 4 * config.model.hidden_size, 4, 2
    first = away * (row + number)  # forward: a row and its weight there,
    first += here * row  # ... outputs of the other's rows back;
    first += away * row  # backward: the outputs' gradients there,
    first += here * (row + number)  # ... those of the other's rows and weights back
    return layers * (first + 8 * half)  # int64 counts, forward only


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of four profiles, in two goes.

    Experts are wide and rows long: what the load costs is then far above a message of all tokens,
    by which peaks differ that are taken twice.
    """
    path = tmp_path_factory.mktemp("cost") / "runs" / "cost.json"
    config = small(**{"model.expert_size": 64, "data.row_length": 128})
    asked = dict(list(profiles(8, 2).items())[i] for i in (0, 1, 4, 8))
    for rounds in (1, 2):
        points = Points.begin(path, config, "cpu", asked)
        timing.measure(points, path, rounds)
        (path.parent / f"after-{rounds}.json").write_bytes(path.read_bytes())
    return path


@pytest.mark.distributed
def test_bytes_are_those_of_a_naive_count(measured: Path) -> None:
    points = Points.read(measured)
    config = points.settings
    for name, ratios_E in points.profiles.items():
        counts_E = counts_of(ratios_E, config.micro_rows * config.data.row_length, 2)
        wanted = naive_sent(config, counts_E)
        assert points.sizes[name].sent_bytes == [[0, wanted], [wanted, 0]]
        largest = max(counts_E[:4].sum(), counts_E[4:].sum())
        assert max(points.sizes[name].largest_bytes) == 4 * config.model.hidden_size * largest


@pytest.mark.distributed
def test_the_loaded_device_takes_more_memory_and_the_other_less(measured: Path) -> None:
    sizes = Points.read(measured).sizes
    first = [sizes[name].peak_bytes[0] for name in ("50 %, even", "75 %, even", "100 %, even")]
    second = [sizes[name].peak_bytes[1] for name in ("50 %, even", "75 %, even", "100 %, even")]
    assert first == sorted(first)
    assert second == sorted(second, reverse=True)
    assert first[2] > first[0]


@pytest.mark.distributed
def test_measuring_goes_on_where_it_was(measured: Path) -> None:
    before, after = (Points.read(measured.parent / f"after-{n}.json") for n in (1, 2))
    assert (len(before.rounds), len(after.rounds)) == (1, 2)
    assert after.rounds[0] == before.rounds[0]
    assert after.sizes == before.sizes
    assert all(len(steps) == timing.TIMED for steps in after.rounds[1].values())
    for name in after.profiles:
        assert after.worked(name).shape == (2, 2)
        assert (after.seconds(name) > 0).all()
    stamp = measured.stat().st_mtime_ns
    said: list[str] = []
    timing.measure(after, measured, 2, said.append)
    assert measured.stat().st_mtime_ns == stamp
    assert "nothing to do" in said[0]


@pytest.mark.parametrize(
    ("told", "code", "said"),
    [
        ([("failed", "ValueError: wrong")], None, "failed: ValueError: wrong"),
        ([], -9, r"ended early \(exit codes \[-9, None\]\)"),
    ],
)
def test_a_process_that_fails_says_why(told: list[Any], code: int | None, said: str) -> None:
    news: queue.Queue[Any] = queue.Queue()
    for entry in told:
        news.put(entry)
    workers = [SimpleNamespace(exitcode=code), SimpleNamespace(exitcode=None)]
    with pytest.raises(EquipoiseError, match=said):
        timing._next(news, workers)


# -- points and page ------------------------------------------------------------------------------


def made_up(path: Path, rounds: int = 6, noise: float = 0.0) -> Points:
    """Points of 100 ms and 0.1 ms a row (of processor time half), 1 MB and 1 kB a row."""
    points = Points.begin(path, small(), "cpu", profiles(8, 2))
    rng = np.random.default_rng(0)
    for name in points.profiles:
        rows = lines.device_rows(points, name)
        peak = [int(1_000_000 + 1000 * value) for value in rows]
        points.sizes[name] = Sizes(peak, [[0, 5], [5, 0]], [3, 4], [7, 7])
    for _ in range(rounds):
        turns = {}
        for name in points.profiles:
            each_P = 0.1 + 1e-4 * lines.device_rows(points, name)
            walls = each_P.max() + noise * abs(rng.normal(size=3))
            turns[name] = [[float(wall), *(each_P / 2).tolist()] for wall in walls]
        points.rounds.append(turns)
    points.write(path)
    return points


def table(text: str, heading: str) -> Iterator[list[str]]:
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    return ([cell.strip() for cell in line.strip("|").split("|")] for line in rows[1:])


def test_points_come_back_as_written(tmp_path: Path) -> None:
    points = made_up(tmp_path / "cost.json")
    assert Points.read(tmp_path / "cost.json") == points
    again = Points.begin(tmp_path / "cost.json", small(), "cpu", profiles(8, 2))
    assert again.rounds == points.rounds


def test_the_lines_are_those_that_the_points_were_made_of(tmp_path: Path) -> None:
    found = lines.Lines.of(made_up(tmp_path / "cost.json"))
    assert (found.time.base, found.time.slope) == pytest.approx((0.1, 1e-4))
    assert (found.memory.base, found.memory.slope) == pytest.approx((1e6, 1e3))
    assert found.fair == 2 * 2 * 16 * 2  # layers with experts, rows of text, tokens, top-2
    share = 1e-4 * found.fair / (0.1 + 1e-4 * found.fair)
    assert found.share() == pytest.approx((share, share, share))
    assert found.share(worked=True) == pytest.approx((share, share, share))
    assert len(found.checked) == 7


def test_points_become_a_page_that_tells_the_check(tmp_path: Path) -> None:
    made_up(tmp_path / "runs" / "cost.json", noise=1e-4)
    path = pages.run_experiment("cost", tmp_path, redraw=True)
    text = path.read_text()
    rows = list(table(text, "Step time"))
    assert [row[0] for row in rows] == list(profiles(8, 2))
    assert [row[-2] for row in rows].count("fitted") == 3
    assert all(abs(float(row[-2].split()[0])) < 1 for row in rows if row[-2] != "fitted")
    assert [row[2] for row in rows[::2]] == ["1.00", "1.25", "1.50", "1.75", "2.00"]
    assert "What may not be concluded" in text
    assert "Not finished here: no balancing, Switch loss 0.01, 4 x the experts." in text
    for part in text.split("](")[1:]:
        assert (tmp_path / part.partition(")")[0]).exists()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    pages.run_experiment("cost", tmp_path, redraw=True)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before


def test_loads_of_many_devices_are_those_of_the_definition(tmp_path: Path) -> None:
    found = cost_devices.loads(tmp_path)
    assert [entry.max_vio for entry in found] == list(cost_devices.HOT)
    for entry in found:
        ratios_E = one_hot(entry.max_vio, cost_devices.EXPERTS).tolist()
        for devices, ratio in entry.ratios.items():
            assert ratio == pytest.approx(naive_busiest(ratios_E, devices))
        assert entry.ratios[64] == pytest.approx(1 + entry.max_vio)


def test_a_redraw_without_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match="is not there: run it without --redraw"):
        pages.run_experiment("cost", tmp_path, redraw=True)
    made_up(tmp_path / "runs" / "cost.json", rounds=2)
    with pytest.raises(EquipoiseError, match="2 rounds; the page takes 3"):
        pages.run_experiment("cost", tmp_path, redraw=True)
    (tmp_path / "runs" / "cost.json").write_text("{}")
    with pytest.raises(EquipoiseError, match="holds no points"):
        pages.run_experiment("cost", tmp_path, redraw=True)


def test_points_of_another_setting_or_machine_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    points = made_up(path)
    with pytest.raises(EquipoiseError, match="points of another config"):
        Points.begin(path, small(**{"model.expert_size": 9}), "cpu", profiles(8, 2))
    replace(points, environment={**points.environment, "processor": "Another"}).write(path)
    with pytest.raises(EquipoiseError, match="times of processor Another"):
        Points.begin(path, small(), "cpu", profiles(8, 2))


def test_what_it_cannot_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ({"seeds": 2}, {"data": "text"}, {"workers": 2}):
        with pytest.raises(EquipoiseError, match="leave out --seeds, --data and --workers"):
            pages.run_experiment("cost", tmp_path, **asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EquipoiseError, match="over 2 GPUs, and torch sees 1"):
        pages.run_experiment("cost", tmp_path, tier="gpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tier", pages.TIERS)
def test_a_tier_s_setting_fits_its_profiles(tier: str) -> None:
    config = cost.setting(tier)
    assert config.batch_rows == 2 * config.micro_rows
    for ratios_E in profiles(config.model.experts, config.model.top_k).values():
        Imposed(ratios_E).check(config.model.experts, config.model.top_k)
    assert EXPERIMENTS["cost"].configs(tier, 1) == []
