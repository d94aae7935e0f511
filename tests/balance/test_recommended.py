"""The terms to begin with: they attach, balance, and stay in what the model saves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from equipoise.balance import Bias, Loss, attach, recommended
from equipoise.balance.controllers import Quantile, QuantileHistogram
from equipoise.balance.controllers.margins import GroupLimit
from equipoise.errors import EquipoiseError
from equipoise.lab.config import ModelConfig
from equipoise.lab.model import LanguageModel
from tests.capture.mmlu_tools import make_model
from tests.models import tiny

EXPERTS = 16


def lab_model(router: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(hidden_size=32, layers=2, heads=2, kv_heads=2, experts=EXPERTS, expert_size=16,
                    router=router, router_std=0.5), vocab_size=64,
    )  # fmt: skip


def max_vio(model: nn.Module, steps: int, *terms: Loss | Bias) -> float:
    """MaxVio of a step's tokens after some steps, mean over layers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, *terms, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, 64, (32, 33), generator=generator)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = handle.metrics()["balance/max_vio"]
    handle.detach()
    return found


@pytest.mark.parametrize(
    ("router", "kind"),
    [
        ("sigmoid", Bias),
        ("sigmoid(selection=group_limited(groups=4, limit=2))", Bias),
        ("sigmoid(selection=group_limited(groups=8, limit=2))", Bias),
        ("sigmoid(selection=group_limited(groups=4, limit=1))", Bias),
        ("softmax", Bias),
        ("softmax(selection_bias=False)", Loss),
        ("mixtral", Loss),
    ],
)
def test_a_model_is_balanced_by_what_it_can_keep(router: str, kind: type) -> None:
    model = lab_model(router)
    terms = recommended(model)
    assert [type(term) for term in terms] == [kind]
    plain = max_vio(copy.deepcopy(model), 40)
    assert max_vio(model, 40, *terms) < plain / 2


def test_a_family_with_a_selection_bias_saves_its_balance(tmp_path: Path) -> None:
    size = {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    size |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_group": 1,
    }
    size |= {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "topk_group": 1,
    }
    model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**size))
    (term,) = recommended(model)
    assert term == Bias(QuantileHistogram())
    handle = attach(model, term)
    ids = torch.randint(0, 60, (4, 16))
    for _ in range(3):
        model(input_ids=ids).logits.sum().backward()
        handle.step()
    biases = handle.bias()
    assert all(bias.abs().max() > 0 for bias in biases)
    handle.detach()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    found = [v for k, v in loaded.state_dict().items() if k.endswith("e_score_correction_bias")]
    assert len(found) == len(biases)
    assert all(torch.equal(a, b) for a, b in zip(found, biases, strict=True))


@pytest.mark.parametrize(
    ("groups", "limit", "top_k", "told"),
    [
        (1, 1, 2, None),
        (4, 4, 2, None),  # no limit
        (4, 2, 2, GroupLimit(4, 2)),
        (8, 3, 2, GroupLimit(8, 3, best=1)),
        (4, 1, 2, GroupLimit(4, 1)),  # whole groups
    ],
)
def test_the_quantile_goes_by_the_groups_of_the_family(
    groups: int, limit: int, top_k: int, told: GroupLimit | None
) -> None:
    size = {"hidden_size": 32, "moe_intermediate_size": 16, "vocab_size": 64, "n_routed_experts": 8}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    size |= {"num_experts_per_tok": top_k, "first_k_dense_replace": 0}
    config = hf.Glm4MoeConfig(**size, n_group=groups, topk_group=limit)
    (term,) = recommended(hf.Glm4MoeForCausalLM(config))
    assert term == Bias(QuantileHistogram(groups=told))


def test_a_softmax_router_with_a_bias_of_its_own_gets_it_set() -> None:
    size = {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.Ernie4_5_MoeConfig(**size, moe_num_experts=8, moe_k=2, moe_layer_start_index=0)
    model = hf.Ernie4_5_MoeForCausalLM(config)
    terms = recommended(model)
    assert terms == (Bias(Quantile()),)
    handle = attach(model, *terms)
    ids = torch.randint(0, 60, (8, 64))
    seen = []
    for _ in range(20):
        model(input_ids=ids).logits.sum().backward()
        handle.step()
        seen.append(handle.metrics()["balance/max_vio"])
    assert seen[-1] < seen[0] / 2


def test_both_stacks_of_a_model_of_text_and_images_get_theirs_set() -> None:
    model = tiny.build("ernie4_5_vl_moe").train()
    tiny.randomise_routing(model)
    terms = recommended(model)
    assert terms == (Bias(Quantile()),)
    handle = attach(model, *terms)
    inputs = tiny.inputs_for(model)
    seen = []
    for _ in range(20):
        model(**inputs)[0].sum().backward()
        handle.step()
        seen.append(handle.metrics()["balance/max_vio"])
    assert seen[-1] < seen[0] / 2


@pytest.mark.parametrize("arch", ["longcat_flash", "zaya"])
def test_experts_that_compute_nothing_are_left_out_of_it(arch: str) -> None:
    (term,) = recommended(tiny.build(arch))
    assert isinstance(term, Loss)


def test_a_family_without_one_gets_a_loss() -> None:
    assert isinstance(recommended(make_model("olmoe", torch.float32))[0], Loss)


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(EquipoiseError, match="router"):
        recommended(nn.Linear(2, 2))
