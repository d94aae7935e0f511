"""The experiment on other remedies, and what routers that look at later tokens gain by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.lab import Config, LanguageModel, load_corpus, pages
from equipoise.lab.batches import held_out_rows
from equipoise.lab.evaluate import Evaluation, evaluate
from equipoise.lab.experiments import leaks, remedies
from equipoise.lab.leak import Leak, causal_routing, measure
from equipoise.lab.results import Result, folder_of
from equipoise.lab.trainer import train
from equipoise.nn import Experts, SoftMoE
from tests.lab.made_up import SMALL

Configure = Callable[..., Config]


@pytest.mark.parametrize("tier", pages.TIERS)
def test_every_run_changes_one_thing(tier: str) -> None:
    base, *others = remedies.configs(tier, 1)
    for config in others:
        model = {k: v for k, v in vars(config.model).items() if v != getattr(base.model, k)}
        assert len(model) + (config.balance != base.balance) == 1
        call = config.model.router
        if "chunk=" in call:  # an expert's share of a chunk is a whole number of tokens
            size = leaks.chunk(Result(config, Path()))
            assert size is not None
            assert size[0] * config.model.top_k % config.model.experts == 0


SIZE = {k: v for k, v in SMALL.items() if k != "micro_rows"} | {
    "model.experts": 16,
    "micro_rows": 4,
}
FINISHED = (
    "expert choice, chunks of 8",
    "expert choice, chunks of 8, shuffled",
    "soft MoE",
    "expert threshold",
    "life cycle, core and reserve",
    "capacity 1.25, drop",
)


def test_a_page_is_made_of_the_runs_there_are(tmp_path: Path, configure: Configure) -> None:
    place = configure().data
    small = {**SIZE, "tokens": 8 * 16 * 12, "evaluation_tokens": 48, "data.domains": ""}
    small |= {"data.source": place.source, "data.cache": place.cache}
    configs = [config.change(small) for config in remedies.configs("cpu", 1)]
    found = {}
    for config in configs:
        if config.name in FINISHED:
            train(config, folder_of(tmp_path / "runs", config), save=False)
            result = Result.find(tmp_path / "runs", config)
            assert result is not None
            found[config.name] = result
    text = pages.write_page(remedies.EXPERIMENT, configs, tmp_path, "cpu").read_text()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines()}
    assert set(FINISHED) <= rows.keys()
    assert remedies.PLAIN not in rows
    ranked, apart = (text[text.index(part) :] for part in ("## Result", "## Routers that look"))
    assert "soft MoE" not in ranked[: ranked.index("## Routers that look")]
    assert "expert choice, chunks of 8 " in apart
    for part in text.split("](")[1:]:
        assert (tmp_path / part.partition(")")[0]).exists()
    assert 0 < found["capacity 1.25, drop"].dropped_share < 1
    assert np.isnan(found["life cycle, core and reserve"].dropped_share)
    assert np.isnan(found["life cycle, core and reserve"].unchosen_share)
    unchosen = [n for n in FINISHED if not np.isnan(found[n].unchosen_share)]
    assert unchosen == [*FINISHED[:2], "expert threshold"]
    assert all(0 < found[n].unchosen_share < 1 for n in unchosen)
    for name in unchosen:
        assert f" | {100 * found[name].unchosen_share:.1f} % |" in text[text.index(f"| {name} |") :]
    events = found["life cycle, core and reserve"].summary["events"]
    assert [e["expert"] for e in events if e["what"] == "reserved"] == 2 * list(range(8, 16))
    out = sum(
        (found["life cycle, core and reserve"].counts[-1, layer, expert] == 0)
        for layer, expert in {(e["layer"], e["expert"]) for e in events}
    )
    assert remedies._out(events) <= out
    for name in FINISHED[:3]:
        assert found[name].final.leak is not None


def test_cells_are_out_until_they_are_woken_and_may_go_out_again() -> None:
    story = [(0, 1, "frozen"), (0, 1, "woken"), (1, 1, "reserved"), (0, 2, "retired")]
    story += [(0, 3, "revived"), (0, 1, "frozen"), (1, 1, "woken")]
    events: Any = [{"layer": x, "expert": e, "what": what} for x, e, what in story]
    assert remedies._out(events) == 2


class Oracle(torch.nn.Module):
    """Loses 1 nat on each target, but nothing where the next token of its input is the target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.blocks = [SimpleNamespace(mlp=SoftMoE(4, Experts(2, 4, 4)))]
        self.passes: list[tuple[int, ...]] = []

    def moe_layers(self) -> list[Any]:
        return []

    def forward(self, ids: Any, targets: Any, reduction: str = "none") -> Any:
        self.passes.append(tuple(ids.shape))
        known = torch.zeros_like(ids, dtype=torch.bool)
        known[:, :-1] = ids[:, 1:] == targets[:, :-1]
        return 1.0 - known.flatten().float()


def test_a_model_that_reads_the_text_to_come_is_told_from_one_that_does_not(
    configure: Configure,
) -> None:
    data = configure().data
    corpus, oracle = load_corpus(data), Oracle()
    leak = measure(oracle, corpus, data.row_length, 4)  # type: ignore[arg-type]
    assert leak is not None
    length = data.row_length
    last = 1 / length  # of the last position no input shows the target
    np.testing.assert_allclose(leak.as_trained, last)
    np.testing.assert_allclose(leak.causal, 1.0)
    assert (leak.other_future > 0.7).all()  # other text has the same token there by chance
    assert (leak.other_future < 1.0).all()
    assert max(shape[0] for shape in oracle.passes) == 4
    value, half = leak.gap("causal")
    assert value == pytest.approx(1 - last)
    assert half == pytest.approx(0, abs=1e-9)


def test_a_router_that_sees_no_later_token_has_no_leak_to_measure(configure: Configure) -> None:
    config = configure()
    corpus = load_corpus(config.data)
    model = LanguageModel(config.model, config.data.vocab_size).eval()
    assert measure(model, corpus, config.data.row_length, 4) is None


def choosing(config: Config, router: str) -> LanguageModel:
    """Weights and thresholds with which experts differ."""
    torch.manual_seed(0)
    model = LanguageModel(config.change({"model.router": router}).model, config.data.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.train()(torch.randint(0, 300, (8, 16)))
    model.step()
    return model.eval()


@pytest.mark.parametrize("shuffle", [False, True])
def test_expert_choice_is_evaluated_causally_and_trained_as_before(
    shuffle: bool, configure: Configure
) -> None:
    config = configure(model__experts=8)
    corpus, length = load_corpus(config.data), config.data.row_length
    model = choosing(config, f"expert_choice(chunk=8, shuffle={shuffle})")
    found = evaluate(model, corpus, length, tokens=64)
    for index, domain in enumerate(corpus.domains):
        rows = held_out_rows(domain, length, 64)
        with (
            torch.no_grad(),
            causal_routing(model),
        ):  # a row by itself, then one more token at a time
            alone = [model(row[None, :-1], row[None, 1:]) for row in rows]
            short = model(rows[:1, :5], rows[:1, 1:6], reduction="none")
            whole = model(rows[:1, :-1], rows[:1, 1:], reduction="none")
        assert found.losses[index] == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
        torch.testing.assert_close(short, whole[:5])
    assert found.leak is None
    assert not any(layer.gate.causal for layer in model.moe_layers())
    ids = torch.randint(0, 300, (2, 16))
    changed = ids.clone()
    changed[:, 8:] = torch.randint(0, 300, (2, 8))
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(ids)
        torch.manual_seed(1)
        second = model(changed)
    assert torch.equal(first[:, :8], second[:, :8]) != shuffle  # chunks of 8 in order end there


def test_thresholds_leave_what_is_learned_as_it_was(configure: Configure) -> None:
    """Noting the scores draws no number and moves no gradient."""
    config = configure(model__experts=8)
    ids = torch.randint(0, 300, (4, 17))
    found = []
    for note in (True, False):
        model = choosing(config, "expert_choice(chunk=8, shuffle=True)").train()
        if not note:
            for layer in model.moe_layers():
                layer.gate._note = lambda _: None
        torch.manual_seed(2)
        model(ids[:, :-1], ids[:, 1:]).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_leak_is_kept_with_its_evaluation_and_absent_ones_add_nothing() -> None:
    tables = [np.array([2.0, 3.0]), np.array([2.5, 3.1]), np.array([2.2, 3.0])]
    leak = Leak(*tables, np.array([0.03, 0.04]), np.array([0.3, 0.4]))
    assert leak.gap("other_future") == pytest.approx((0.3, 1.96 * 0.05 / 2))
    assert leak.gap("causal") == pytest.approx((0.1, 1.96 * 0.5 / 2))
    for given in (leak, None):
        evaluation = Evaluation(
            ("a", "b"),
            tables[0],
            np.array([1, 1]),
            tables[1],
            np.zeros((2, 1, 4), int),
            tables[2][:, None],
            given,
        )
        kept = evaluation.to_dict()
        assert ("leak" in kept) == (given is not None)
        assert Evaluation.from_dict(kept).to_dict() == kept


def fake(router: str, leak: tuple[float, float]) -> Any:
    """A finished run with a leak and its error."""
    half = leak[1] / 1.96
    values = [np.array([v]) for v in (3.0, 3.0 + leak[0], 3.1, half, half)]
    config = Config().change({"model.router": router})
    return SimpleNamespace(config=config, final=SimpleNamespace(leak=Leak(*values)))


def test_findings_say_a_leak_only_beyond_its_interval() -> None:
    runs = {
        "all": [fake("expert_choice", (0.001, 0.002))],
        "eight": [fake("expert_choice(chunk=8)", (0.020, 0.004))],
        "shuffled": [fake("expert_choice(chunk=8, shuffle=True)", (-0.0001, 0.003))],
    }
    (said,) = leaks._findings(runs)
    assert "above 0 beyond its interval: eight (+0.020 ± 0.004)." in said
    assert "from 0: all (+0.001 ± 0.002), shuffled (+0.000 ± 0.003)." in said
    assert "Shuffled, chunks of 8 leak 0.020 ± 0.005 nats less, beyond its interval" in said
    runs["shuffled"] = [fake("expert_choice(chunk=8, shuffle=True)", (0.050, 0.003))]
    (said,) = leaks._findings(runs)
    assert "Shuffled, chunks of 8 leak 0.030 ± 0.005 nats more, beyond its interval" in said
    runs["shuffled"] = [fake("expert_choice(chunk=8, shuffle=True)", (-0.030, 0.010))]
    (said,) = leaks._findings(runs)
    assert "from 0: all (+0.001 ± 0.002)." in said
    assert "falls, beyond its interval: shuffled (-0.030 ± 0.010)." in said
    assert "2048" not in said
    assert leaks.chunk(runs["all"][0]) == (2048, False)
