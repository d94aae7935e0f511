"""The language model, its weights on disk, and its double in transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import equipoise
from equipoise.errors import EquipoiseError
from equipoise.lab import Config, LanguageModel, ModelConfig, load, load_corpus, train
from equipoise.lab.batches import held_out_rows
from equipoise.lab.evaluate import evaluate
from equipoise.lab.export import target_of, to_transformers
from equipoise.lab.folder import RunFolder
from equipoise.lab.model import least_parameters, parameters_of
from equipoise.lab.weights import load_tokenizer

Configure = Callable[..., Config]
SIZES = {
    "hidden_size": 32,
    "layers": 3,
    "heads": 4,
    "kv_heads": 4,
    "experts": 8,
    "top_k": 2,
    "expert_size": 16,
    "dense_size": 24,
}


def model_of(**values: Any) -> LanguageModel:
    """Weights large enough that routers, norms and biases matter."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{**SIZES, **values}), 50).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(5)
        for layer in model.moe_layers():
            if layer.gate.selection_bias is not None and values.get("router") != "mixtral":
                layer.gate.selection_bias.normal_(std=0.1)
    return model


def test_learned_noise_begins_alike_for_all_experts_and_leaves_the_other_weights_as_they_are() -> (
    None
):
    plain, noisy = (
        model_of(router=f"softmax(weighting=scores{noise})") for noise in ("", ", noise=learned")
    )
    theirs = dict(plain.named_parameters())
    noise = {name: p for name, p in noisy.named_parameters() if name not in theirs}
    assert len(noise) == 3
    assert not any(p.any() for p in noise.values())
    assert all(
        torch.equal(p, theirs[name]) for name, p in noisy.named_parameters() if name in theirs
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("shared_experts", [0, 2])
@pytest.mark.parametrize(
    ("router", "architecture"),
    [
        ("softmax", "Ernie4_5_MoeForCausalLM"),
        ("mixtral", "Ernie4_5_MoeForCausalLM"),
        ("sigmoid", "Glm4MoeForCausalLM"),
        ("sigmoid(weighting=scores, route_scale=2.5)", "Glm4MoeForCausalLM"),
        ("sigmoid(selection=group_limited(groups=4, limit=2))", "Glm4MoeForCausalLM"),
        ("softmax(temperature=0.5)", "Ernie4_5_MoeForCausalLM"),
        ("softmax(weighting=scores, selection_bias=False)", "Qwen2MoeForCausalLM"),
    ],
)
def test_logits_of_the_exported_model_are_those_of_the_trained_one(
    router: str,
    architecture: str,
    shared_experts: int,
    dense_layers: int,
    kv_heads: int,
    tied: bool,
) -> None:
    model = model_of(
        router=router,
        shared_experts=shared_experts,
        dense_layers=dense_layers,
        kv_heads=kv_heads,
        tied=tied,
    )
    exported = to_transformers(model)
    assert type(exported).__name__ == architecture
    ids = torch.randint(50, (2, 20))
    with torch.no_grad():
        ours, theirs = model(ids), exported(ids).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"router": "hash"}, "hash"),
        ({"router": "soft"}, "soft"),
        ({"router": "sigmoid(precision=bfloat16)"}, "precision"),
        ({"router": "sigmoid(score_function=softmax)"}, "score_function"),
        ({"router": "sigmoid(weighting=equal)"}, "weighs"),
        ({"router": "softmax(weighting=equal)"}, "weighs"),
        ({"router": "softmax(weighting=scores)"}, "selection bias"),
        ({"capacity": "capacity(factor=1.5)"}, "limits the load"),
    ],
    ids=lambda v: str(v),
)
def test_what_has_no_architecture_says_why(values: dict[str, Any], why: str) -> None:
    found = target_of(model_of(**values))
    assert isinstance(found, str)
    assert why in found


def test_the_saved_model_is_loaded_by_transformers_and_counts_the_same_experts(
    configure: Configure, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = configure(model__router="sigmoid", balance="sign(rate=0.02)", model__dense_layers=1)
    result = train(config, tmp_path / "run")
    assert result["saved"]["model"] == "model"
    ours = load(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    biases = [layer.gate.selection_bias for layer in ours.moe_layers()]
    gates = [m for n, m in theirs.named_modules() if n.endswith("mlp.gate")]
    assert any(bool(bias.any()) for bias in biases)
    for bias, gate in zip(biases, gates, strict=True):
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, bias)

    corpus = load_corpus(config.data)
    rows = [held_out_rows(domain, 16, 200)[:, :-1] for domain in corpus.domains]
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows[0]).logits, ours(rows[0]), rtol=1e-4, atol=1e-5)
        with equipoise.record(theirs, tmp_path / "trace", level="counts"):
            for ids in rows:
                theirs(ids)
    found = evaluate(ours, corpus, 16, tokens=200)
    assert (equipoise.open(tmp_path / "trace").counts_LE == found.counts.sum(0)).all()
    recorded = equipoise.open(tmp_path / "run" / "trace")
    assert (recorded.counts_LE == found.counts.sum(0)).all()
    for number, name in enumerate(corpus.names):
        assert (recorded.select(domain=[name]).counts_LE == found.counts[number]).all()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    text = "abc 123 αβγ"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"] == corpus.tokenizer().encode(text).ids
    assert tokenizer.eos_token_id == theirs.config.eos_token_id


def test_in_bfloat16_the_exported_bias_stays_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_of(router="sigmoid")
    to_transformers(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, block in zip(model.moe_layers(), loaded.model.layers, strict=True):
        assert block.mlp.gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(block.mlp.gate.e_score_correction_bias, layer.gate.selection_bias)


def test_weights_without_an_architecture_are_loaded_by_the_lab(
    configure: Configure, tmp_path: Path
) -> None:
    said: list[str] = []
    config = configure(model__router="hash", trace=False, model__tied=False)
    result = train(config, tmp_path / "run", say=said.append)
    assert result["saved"]["model"] is None
    assert any("Not saved for transformers" in line for line in said)
    found = evaluate(load(tmp_path / "run"), load_corpus(config.data), 16, tokens=200)
    assert found.loss == pytest.approx(result["loss"], rel=1e-6)
    corpus = load_corpus(config.data)
    ids = corpus.domains[0].held_out[:20].tolist()
    assert load_tokenizer(tmp_path / "run").decode(ids) == corpus.tokenizer().decode(ids)


def test_damaged_weights_say_so(configure: Configure, tmp_path: Path) -> None:
    train(configure(trace=False), tmp_path / "run")
    file = tmp_path / "run" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EquipoiseError, match=r"weights\.safetensors cannot be read"):
        load(tmp_path / "run")


def test_an_unfinished_run_has_no_weights_to_load(configure: Configure, tmp_path: Path) -> None:
    train(configure(trace=False), tmp_path / "run", save=False)
    with pytest.raises(EquipoiseError, match="the run is not finished, or kept no weights"):
        load(tmp_path / "run")
    with pytest.raises(EquipoiseError, match="is no run's folder"):
        load(tmp_path / "nothing")


# -- the model itself -------------------------------------------------------------------------


def test_a_token_sees_no_later_one() -> None:
    model = model_of()
    ids = torch.randint(50, (1, 12))
    other = ids.clone()
    other[0, 8:] = torch.randint(50, (4,))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :8], model(other)[:, :8])


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_attention_on_a_cpu_stays_in_float32(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(hidden_size=32, layers=1, expert_size=16), 50)
    ids = torch.randint(50, (2, 9))
    seen: list[torch.dtype] = []
    attention = F.scaled_dot_product_attention

    def watched(*heads: torch.Tensor, **options: Any) -> torch.Tensor:
        mixed = attention(*heads, **options)
        seen.extend(tensor.dtype for tensor in (*heads, mixed))
        return mixed

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    added: list[torch.dtype] = []
    model.blocks[0].attention.register_forward_hook(lambda *call: added.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        assert model(ids).dtype == torch.bfloat16  # as nn.Linear gives them
    assert seen == [torch.float32] * 4
    assert added == [torch.float32]


def test_losses_are_those_of_the_logits() -> None:
    model = model_of()
    ids, targets = torch.randint(50, (2, 2, 12))
    with torch.no_grad():
        wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(model(ids, targets, reduction="none"), wanted)
        torch.testing.assert_close(model(ids, targets), wanted.mean())


def test_parameters_are_counted_with_the_experts_of_a_token() -> None:
    model = model_of(shared_experts=1, dense_layers=1, tied=False)
    expert = 3 * 32 * 16
    found = parameters_of(model)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert found["total"] - found["active"] == 2 * (8 - 2) * expert


def one_by_one(model: LanguageModel, rows: torch.Tensor) -> tuple[list[float], Any, Any]:
    """Losses of rows, selections [L, E] and sums of selected scores [L], counted in Python."""
    counts, sums = np.zeros((2, 4), np.int64), np.zeros(2)

    def count(index: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        for expert in ids.flatten().tolist():
            counts[index, expert] += 1
        sums[index] += float(torch.sigmoid(logits).gather(1, ids).sum())

    hooks = [
        layer.gate.register_forward_hook(lambda _g, _i, out, n=index: count(n, out[0], out[2]))
        for index, layer in enumerate(model.moe_layers())
    ]
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in rows]
    for hook in hooks:
        hook.remove()
    return losses, counts, sums


def test_evaluation_is_the_mean_over_rows_one_by_one(configure: Configure, tmp_path: Path) -> None:
    config = configure(model__router="sigmoid")
    corpus = load_corpus(config.data)
    torch.manual_seed(0)
    model = LanguageModel(config.model, config.data.vocab_size)
    found = evaluate(model, corpus, 16)
    assert model.training
    for number, domain in enumerate(corpus.domains):
        rows = held_out_rows(domain, 16)
        losses, counts, sums = one_by_one(model, rows)
        assert found.tokens[number] == len(rows) * 16
        assert found.losses[number] == pytest.approx(np.mean(losses), rel=1e-5)
        assert (found.counts[number] == counts).all()
        assert found.weight_sums[number] == pytest.approx(sums / found.tokens[number], rel=1e-5)
    again = type(found).from_dict(found.to_dict())
    assert (again.counts == found.counts).all()
    assert again.loss == found.loss


def test_the_commit_is_that_of_the_checkout() -> None:
    from equipoise.lab.folder import commit

    if not (Path(equipoise.__file__).parents[2] / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout")
    found = commit()
    assert found is not None
    assert len(found.rstrip("+")) >= 10


def test_a_folder_says_what_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(EquipoiseError, match="is no run's folder: it has no"):
        RunFolder(tmp_path).config()


@pytest.mark.parametrize("values", [{}, {"kv_heads": 2, "dense_layers": 1, "shared_experts": 2},
                                    {"tied": False}])  # fmt: skip
def test_least_parameters_are_all_but_norms_and_routers(values: dict[str, Any]) -> None:
    model = model_of(**values)
    gates = {id(layer.gate.weight) for layer in model.moe_layers()}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in gates]
    assert least_parameters(model.config, 50) == sum(p.numel() for p in matrices)
