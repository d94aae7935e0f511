"""Configs: values by name, and what is refused with both values named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equipoise.balance import CATALOGUE
from equipoise.errors import EquipoiseError
from equipoise.lab import RECIPES, Config, recipe
from equipoise.lab.config import differences
from equipoise.lab.terms import Call, balancing, one, parse


def test_values_are_read_from_text_as_the_type_of_their_field() -> None:
    config = Config().change(
        {
            "tokens": "2e6",
            "optimizer.lr": "1e-3",
            "model.tied": "false",
            "data.domains": "python, medical",
            "data.domain_field": "none",
            "precision": "bfloat16",
        }
    )
    assert config.tokens == 2_000_000
    assert isinstance(config.tokens, int)
    assert config.optimizer.lr == 1e-3
    assert config.model.tied is False
    assert config.data.domains == ("python", "medical")
    assert config.data.domain_field is None
    assert config.precision == "bfloat16"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str) -> None:
    config = recipe(name)
    assert Config.from_json(config.to_json()) == config
    assert config.name == name
    assert RECIPES[name].__doc__


def test_recipes_derive_from_one_another() -> None:
    found = differences(recipe("small_switch"), recipe("small"))
    assert found.keys() == {"name", "balance"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"model.expert": 4},
            ["No setting 'model.expert'", " model.hidden_size,", "Did you mean 'model.experts'?"],
        ),
        ({"modle.experts": 4}, ["No setting 'modle.experts'", "Did you mean 'model.experts'?"]),
        ({"experts": 4}, ["name, model.hidden_size", "Did you mean 'model.experts'?"]),
        ({"model": 4}, ["No setting 'model': there are name, model.hidden_size"]),
        ({"tokens.many": 4}, ["No setting 'tokens.many'", "Did you mean 'tokens'?"]),
        ({"tokens": "many"}, ["tokens='many' is not a whole number"]),
        ({"tokens": "1e400"}, ["tokens='1e400' is not a whole number"]),
        ({"tokens": 1.5}, ["tokens=1.5 is not a whole number"]),
        ({"model.tied": "yes"}, ["model.tied='yes' is not true or false"]),
        ({"optimizer.lr": "nan"}, ["optimizer.lr=nan", "above 0"]),
        ({"optimizer.beta2": 1}, ["optimizer.beta2=1.0", "below 1"]),
        ({"seed": -1}, ["seed=-1", "from 0 to below 2^63"]),
        ({"seed": "1e20"}, ["seed=100000000000000000000", "from 0 to below 2^63"]),
        ({"threads": 100_000}, ["threads=100000", "from 1 to 1024"]),
        ({"optimizer.name": "adam"}, ["'adam'", "adamw, muon", "Did you mean 'adamw'?"]),
        ({"model.top_k": 17}, ["model.top_k=17", "model.experts=16"]),
        ({"model.heads": 3}, ["model.heads=3", "model.hidden_size=128"]),
        ({"model.kv_heads": 3}, ["model.kv_heads=3", "model.heads=4"]),
        ({"model.heads": 128, "model.kv_heads": 1}, ["model.hidden_size=128", "model.heads=128"]),
        ({"model.dense_layers": 4}, ["model.dense_layers=4", "model.layers=4"]),
        ({"micro_rows": 12}, ["micro_rows=12", "batch_rows=64"]),
        ({"data.block": 7}, ["data.block=7", "batch_rows=64"]),
        ({"data.row_length": 4096}, ["data.row_length=4096", "model.max_positions=2048"]),
        (
            {"data.arrangement": "domain", "data.block": 4, "micro_rows": 6, "batch_rows": 12},
            ["data.block=4", "micro_rows=6"],
        ),
        ({"tokens": 100}, ["tokens=100", "batch_rows=64", "data.row_length=128"]),
        ({"data.vocab_size": 257}, ["data.vocab_size=257", "258"]),
        ({"data.vocab_size": 65_537}, ["data.vocab_size=65537", "65536"]),
        ({"data.held_out_tokens": 128}, ["data.held_out_tokens=128", "data.row_length=128"]),
        ({"data.domains": "a,b,a"}, ["a,b,a", "twice"]),
        (
            {
                "optimizer.schedule": "wsd",
                "optimizer.warmup_share": 0.5,
                "optimizer.decay_share": 0.6,
            },
            ["optimizer.warmup_share=0.5", "optimizer.decay_share=0.6"],
        ),
        (
            {"model.capacity": "capacity(factor=2)", "balance": "capacity(factor=1.5)"},
            ["model.capacity='capacity(factor=2)'", "balance='capacity(factor=1.5)'"],
        ),
        ({"model.router": "sigmod"}, ["No router 'sigmod'", "Did you mean 'sigmoid'?"]),
        ({"model.router": "base"}, ["'base'", "model.top_k=2"]),
        ({"model.top_k": 1}, ["model.router='softmax'", "model.top_k=1"]),
        (
            {"model.router": "expert_choice", "model.capacity": "capacity"},
            ["model.capacity='capacity'", "model.router='expert_choice'"],
        ),
        ({"model.router": "hash", "balance": "switch"}, ["balance='switch'", "'hash'"]),
        (
            {"model.router": "relu", "balance": "sign(rate=0.001)"},
            ["balance='sign(rate=0.001)'", "steers itself", "balance=none"],
        ),
        (
            {"model.router": "relu(rate=1.1)", "balance": "lifecycle + switch"},
            ["'relu(rate=1.1)'", "No loss, no bias and no capacity acts", "only lifecycle does"],
        ),
        (
            {"model.router": "expert_choice", "balance": "z + capacity"},
            ["'expert_choice'", "a fixed top-k"],
        ),
        ({"model.router": "random", "balance": "recommended"}, ["drawn at random", "balance=none"]),
        (
            {"model.router": "expert_choice", "balance": "switch"},
            ["'expert_choice'", "equally many tokens", "no loss and no bias"],
        ),
        ({"model.router": "relu", "model.capacity": "capacity"}, ["fixed top-k", "'relu'"]),
        ({"model.router": "sigmoid(route_scal=2)"}, ["'route_scal'", "'route_scale'"]),
        ({"model.router": "sigmoid(weighting=foo)"}, ["weighting='foo'", "renormalized"]),
        ({"model.router": "soft(slots=0)"}, ["slots=0", "at least 1"]),
        ({"model.router": "sigmoid + hash"}, ["'sigmoid + hash'", "2 things"]),
        ({"model.capacity": "capacity(factor=0)"}, ["factor=0", "above 0"]),
        ({"balance": "swich"}, ["No balancing term 'swich'", "Did you mean 'switch'?"]),
        ({"balance": "switch(scope=galaxy)"}, ["scope='galaxy'", "sequence, micro"]),
        ({"balance": "sign(rat=1)"}, ["no option 'rat'", "rate"]),
        ({"balance": "sign + quantile"}, ["balance='sign + quantile'", "2 biases"]),
        ({"balance": "switch(1)"}, ["'switch(1)' is not understood", "switch(scope=global"]),
        ({"balance": "switch + "}, ["is not understood"]),
        ({"balance": "sign(rate={[]: 1})"}, ["is not understood"]),
        ({"balance": "sign(rate=0.1, rate=0.2)"}, ["gives rate= to sign twice"]),
        ({"balance": "lifecycle(reserve=x)"}, ["lifecycle(reserve=x)", "it takes reserve as"]),
        (
            {"model.router": "softmax(jitter=lots)"},
            ["softmax(jitter=lots)", "takes jitter as float"],
        ),
        ({"model.capacity": "capacity(factor=big)"}, ["factor=big", "it takes factor as float"]),
        (
            {"model.router": "sigmoid(selection=group_limited)"},
            ["group_limited", "it needs groups and limit"],
        ),
        ({"model.router": "none"}, ["model.router='none' names 0 things"]),
        (
            {"model.router": "sigmoid(weighting=equal)", "balance": "sign"},
            ["weighting=equal", "balance='sign'", "no gradient"],
        ),
        ({"model.capacity": "capacity(groups=3)"}, ["capacity(groups=3)", "16 experts"]),
        (
            {
                "model.capacity": "capacity(overflow=pad)",
                "expert_parallel": True,
                "processes": 2,
            },
            ["expert_parallel=true", "overflow=pad"],
        ),
        ({"balance": "open('/etc/passwd')"}, ["is not understood"]),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_what_cannot_be_is_refused_with_the_values(
    values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(EquipoiseError) as stop:
        Config().change(values)
    for text in named:
        assert text in str(stop.value)


def test_equal_weights_are_taken_with_a_loss_that_trains_the_router() -> None:
    values = {"model.router": "sigmoid(weighting=equal)", "balance": "switch(weight=0.01) + sign"}
    assert Config().change(values).model.router == values["model.router"]


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        EquipoiseError, match=r"No recipe 'smal': there are .* Did you mean 'small'"
    ):
        recipe("smal")


@pytest.mark.parametrize("value", ["9007199254740993", 9007199254740993])
def test_a_whole_number_is_read_to_its_last_digit(value: str | int) -> None:
    assert Config().change({"seed": value}).seed == 9007199254740993
    assert Config().change({"tokens": "2e6"}).tokens == 2_000_000


def test_terms_are_read_as_written() -> None:
    text = "switch(scope=running(decay=0.9), weight=0.01) + sign(rate=0.001) + capacity"
    calls = parse(text)
    assert [str(call) for call in calls] == text.split(" + ")
    assert calls[0].options == (("scope", Call("running", (("decay", 0.9),))), ("weight", 0.01))
    assert parse("none") == parse("") == ()


def test_words_of_python_are_plain_values() -> None:
    assert one("switch(scope=global)").options == (("scope", "global"),)


def test_the_terms_are_those_of_balance() -> None:
    from equipoise import balance

    loss, bias = balancing("switch(scope=group, weight=0.02) + sign(rate=0.003)")
    assert (loss.name, loss.weight) == ("switch_group", 0.02)
    assert bias == balance.Bias(balance.controllers.Sign(rate=0.003), scope="global")


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_loss_is_made_by_its_name(name: str) -> None:
    options = "(groups=2)" if name in ("group", "communication") else ""
    (loss,) = balancing(name + options)
    assert loss.name == f"{name}_global"


def test_reading_recipes_loads_no_torch() -> None:
    script = (
        "import sys; from equipoise.lab import recipe; recipe('gpu'); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_another_text_brings_its_domains_unless_it_has_the_recipe_s(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    assert recipe("tiny", {"data.source": str(tmp_path)}).data.domains == ()
    named = recipe("tiny", {"data.source": str(tmp_path), "data.domains": "prose"})
    assert named.data.domains == ("prose",)
    for name in recipe("tiny").data.domains:
        (tmp_path / f"{name}.txt").touch()
    assert (
        recipe("tiny", {"data.source": str(tmp_path)}).data.domains == recipe("tiny").data.domains
    )
