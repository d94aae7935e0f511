"""Checkpoints of a handle: with them a resumed run goes on as if never stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.balance.attach import Handle

VERSION = 1


def state_dict(handle: Handle) -> dict[str, Any]:
    """Tensors and plain numbers only: torch.save and safe loading (weights_only) both take it."""
    book, steps = handle.book, handle.steps
    if book.passes:
        raise EquipoiseError(
            f"state_dict(): {book.passes} micro-batches of a step are under way. Save between the "
            "optimizer's step and the next forward pass."
        )
    return {
        "version": VERSION,
        "family": _family(handle),
        "layers": [[site.path, site.num_experts, site.top_k] for site in handle.sites],
        "losses": [loss.name for loss in book.losses],
        "controller": _controller(handle),
        "step": book.step,
        "biases": [bias.read().clone() for bias in handle.biases],
        "controllers": [_cloned(state) for state in steps.states],
        "scopes": [[*key, _cloned(state)] for key, state in book.states.items()],
        "weights": [[term, weight.clone()] for term, weight in book.weights.items()],
        "weight_controllers": [_cloned(state) for state in steps.weight_states],
        "last": None if steps.last is None else steps.last.clone(),
        "gradient_share": handle.measures.gradient_share_L.clone(),
        "probes": [p and [part.clone() for part in p] for p in book.meters.probes],
        "parts": {part.name: part.state_dict() for part in handle.parts},
        "generators": [[seed, g.get_state()] for seed, g in book.generators.items()],
    }


def load_state_dict(handle: Handle, state: dict[str, Any]) -> None:
    """Put a saved state in place; EquipoiseError before anything is changed where it does not fit."""
    if not isinstance(state, dict) or state.get("version") != VERSION:
        seen = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise EquipoiseError(
            f"load_state_dict: a balance state of version {VERSION} is needed, this is {seen!r}."
        )
    missing = sorted(_KEYS - state.keys())
    if missing:
        raise EquipoiseError(
            f"load_state_dict: {', '.join(missing)} missing; this is not a whole balance state."
        )
    _same_family(handle, state["family"])
    _same_layers(handle, state["layers"])
    _finite_biases(handle, state["biases"])
    for name, here in (
        ("losses", [loss.name for loss in handle.book.losses]),
        ("controller", _controller(handle)),
        ("parts", [part.name for part in handle.parts]),
    ):
        saved = list(state.get(name, ())) if name == "parts" else state[name]
        if saved != here:
            raise EquipoiseError(
                f"load_state_dict: saved with {name} {saved!r}, attached with {here!r}. "
                "Attach the same terms, or begin anew without this state."
            )
    book, steps, device = handle.book, handle.steps, handle.device
    book.step = state["step"]
    for bias, saved_E in zip(handle.biases, state["biases"], strict=True):
        bias.write(saved_E)
    for part in handle.parts:
        part.load_state_dict(state["parts"][part.name])
    steps.states = [_cloned(s, device) for s in state["controllers"]]
    for term, bank, saved in state["scopes"]:
        book.states[term, bank] = _cloned(saved, device)
    book.weights = {term: weight.to(device) for term, weight in state["weights"]}
    steps.weight_states = [_cloned(s, device) for s in state["weight_controllers"]]
    steps.last = None if state["last"] is None else state["last"].to(device)
    handle.measures.gradient_share_L = state["gradient_share"].to(device)
    book.meters.probes = [p and (p[0].to(device), p[1].to(device)) for p in state["probes"]]
    for seed, generator in state["generators"]:
        book.generator(seed).set_state(generator)


_KEYS = {"layers", "losses", "controller", "step", "biases", "controllers", "scopes", "weights"} | {
    "family",
    "weight_controllers",
    "last",
    "gradient_share",
    "probes",
    "generators",
}


def _finite_biases(handle: Handle, saved: list[Tensor]) -> None:
    """Minus infinity is an expert out of selection; NaN and the rest are a broken file."""
    for site, bias in zip(handle.sites, saved, strict=False):
        broken = bool((bias.isnan() | bias.isposinf()).any())
        if broken or len(bias) != site.num_experts:
            seen = "not finite" if broken else f"of {len(bias)} experts"
            raise EquipoiseError(
                f"load_state_dict: the saved selection bias of {site.path} is {seen}; the layer has "
                f"{site.num_experts} experts. The state is broken."
            )


def _family(handle: Handle) -> str:
    """What the model is: `config.model_type`, or the name of its class, sharded by FSDP2 or not."""
    return handle.sites[0].family.removeprefix("FSDP")


def _same_family(handle: Handle, saved: str) -> None:
    """Layers of another family may have the same names and shapes."""
    if saved != (here := _family(handle)):
        raise EquipoiseError(
            f"load_state_dict: the state is of a {saved!r} model, this one is {here!r}. Load it into "
            "the model that it was saved with, or begin anew without it."
        )


def _same_layers(handle: Handle, saved: list[list[Any]]) -> None:
    here = [[site.path, site.num_experts, site.top_k] for site in handle.sites]
    if len(here) != len(saved):
        raise EquipoiseError(
            f"load_state_dict: the state is of {len(saved)} MoE layers, this model has {len(here)}."
        )
    for mine, theirs in zip(here, saved, strict=True):
        if mine != list(theirs):
            raise EquipoiseError(
                f"load_state_dict: {mine[0]} has {mine[1]} experts, top-{mine[2]}; the state is of "
                f"{theirs[0]} with {theirs[1]} experts, top-{theirs[2]}. It is another model's."
            )


def _controller(handle: Handle) -> str | None:
    bias = handle.steps.bias
    return None if bias is None else type(bias.controller).__name__


def _cloned(state: dict[str, Tensor], device: Any = None) -> dict[str, Tensor]:
    return {name: value.clone().to(device) for name, value in state.items()}
