"""Balancing terms and routers as one line of text, the same in recipes, on the command line and in tables.

    "switch(scope=global, weight=0.01) + sign(rate=0.001)"

A name with its options, several joined by `+`; names as values need no quotes; options may be calls.
"""

from __future__ import annotations

import ast
import inspect
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, nearest

if TYPE_CHECKING:
    from torch import nn

_WORDS = "|".join(set(keyword.kwlist) - {"True", "False", "None"})
_KEYWORD = re.compile(rf"(?<![\w'\"])({_WORDS})(?![\w'\"])")
"""Words that are Python's, such as `global`, may be values too."""
RECOMMENDED = "recommended"
"""As a whole line: what `equipoise.balance.recommended` gives the model."""
Value = Any
"""A number, string, bool, None, or another `Call`."""


@dataclass(frozen=True)
class Call:
    """A name and its options."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={_shown(value)}" for key, value in self.options)
        return f"{self.name}({inside})" if inside else self.name


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(text: str) -> tuple[Call, ...]:
    """The calls of a line; EquipoiseError for what is not of that form. "" and "none" hold none."""
    if text.strip() in ("", "none"):
        return ()
    try:
        tree = ast.parse(_KEYWORD.sub(r"'\1'", text.strip()), mode="eval").body
    except SyntaxError as error:
        raise _malformed(text) from error
    return tuple(_call(node, text) for node in _summands(tree))


def one(text: str, setting: str = "model.router") -> Call:
    """The single call of a setting's line."""
    calls = parse(text)
    if len(calls) != 1:
        raise EquipoiseError(f"{setting}={text!r} names {len(calls)} things where one is wanted.")
    return calls[0]


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id)
    plain = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args
    if not plain or any(word.arg is None for word in node.keywords):  # type: ignore[attr-defined]
        raise _malformed(text)
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    options = tuple((str(word.arg), _value(word.value, text)) for word in node.keywords)
    names = [name for name, _ in options]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EquipoiseError(f"{text!r} gives {twice}= to {node.func.id} twice.")
    return Call(node.func.id, options)


def _value(node: ast.expr, text: str) -> Value:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return _call(node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _malformed(text) from error


def _malformed(text: str) -> EquipoiseError:
    return EquipoiseError(
        f"{text!r} is not understood: write name(option=value, ...) and join several with +, "
        'for example "switch(scope=global, weight=0.01) + sign(rate=0.001)".'
    )


def make(call: Call, makers: Mapping[str, Callable[..., Any]], kind: str, **given: Any) -> Any:
    """What a call makes, by the maker of its name; its errors name the call.

    `given` goes to the maker beside the call's own options.
    """
    if call.name not in makers:
        raise EquipoiseError(
            f"No {kind} {call.name!r}: there are {', '.join(sorted(makers))}."
            f"{nearest(call.name, makers)}"
        )
    try:
        return makers[call.name](**given, **dict(call.options))
    except TypeError as error:
        raise EquipoiseError(
            f"{kind} {call}: {_mistaken(call, makers[call.name], error)}"
        ) from error
    except (ValueError, EquipoiseError) as error:
        raise EquipoiseError(f"{kind} {call}: {error}") from error


def _mistaken(call: Call, maker: Callable[..., Any], error: TypeError) -> str:
    """What a TypeError says about an option, in a user's words."""
    if "missing" in str(error):
        needed = re.findall(r"'(\w+)'", str(error))
        return f"it needs {' and '.join(needed)}."
    wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if wrong is None:
        kinds = _kinds(maker)
        taken = [f"{name} as {kinds[name]}" for name, _ in call.options if name in kinds]
        return f"it takes {', '.join(taken)}." if taken else f"{error}."
    allowed = options_of(maker)
    said = f"there are {', '.join(allowed)}" if allowed else "it takes none"
    return f"no option {wrong[1]!r}: {said}.{nearest(wrong[1], allowed)}"


def options_of(maker: Callable[..., Any]) -> list[str]:
    """Names of a maker's options; one that hands the rest on says to whom in `options_for`."""
    return list(_kinds(maker))


def _kinds(maker: Callable[..., Any]) -> dict[str, Any]:
    """A maker's options and their annotations."""
    kinds = inspect.signature(maker).parameters
    shape = ("hidden_size", "num_experts", "top_k", "self")
    named = {
        n: p.annotation for n, p in kinds.items() if p.kind is not p.VAR_KEYWORD and n not in shape
    }
    inner = getattr(maker, "options_for", None)
    handed_on = {} if inner is None else _kinds(inner)
    return named | {n: kind for n, kind in handed_on.items() if n not in named}


def balancing(text: str, model: nn.Module | None = None) -> list[Any]:
    """The terms for `equipoise.balance.attach` that a line names; EquipoiseError for two of a kind.

    "recommended" names what `model` can keep; none where no model is given.
    """
    if text.strip() == RECOMMENDED:
        from equipoise.balance import recommended

        return [] if model is None else list(recommended(model))
    if any(call.name == RECOMMENDED for call in parse(text)):
        raise EquipoiseError(
            f"balance={text!r}: {RECOMMENDED} stands by itself and takes no options."
        )
    terms = [make(call, _terms(), "balancing term") for call in parse(text)]
    if terms:
        from equipoise.balance.arguments import sorted_terms

        try:
            sorted_terms(terms)
        except EquipoiseError as error:
            raise EquipoiseError(f"balance={text!r}: {error}") from error
    return terms


def _terms() -> dict[str, Callable[..., Any]]:
    from equipoise.balance import CATALOGUE, Adversarial, Capacity, Lifecycle, controllers

    biases = {
        "sign": controllers.Sign,
        "proportional": controllers.Proportional,
        "multiplicative": controllers.Multiplicative,
        "rms_normalised": controllers.RMSNormalised,
        "momentum_tanh": controllers.MomentumTanh,
        "pid": controllers.PID,
        "quantile": controllers.Quantile,
        "quantile_histogram": controllers.QuantileHistogram,
    }
    return {
        **{name: _loss(name) for name in CATALOGUE},
        **{name: _bias(controller) for name, controller in biases.items()},
        "capacity": Capacity,
        "lifecycle": Lifecycle,
        "adversarial": Adversarial,
    }


def _loss(name: str) -> Callable[..., Any]:
    from equipoise.balance import CATALOGUE, Loss

    taken = sorted({*CATALOGUE[name].options, *CATALOGUE[name].required})

    def maker(
        *,
        scope: Any = "global",
        weight: Any = 1e-3,
        count: Any = "selected",
        convention: str = "equipoise",
        **options: Any,
    ) -> Any:
        for wrong in options.keys() - set(taken):
            allowed = ["scope", "weight", "count", "convention", *taken]
            raise EquipoiseError(
                f"no option {wrong!r}: there are {', '.join(allowed)}.{nearest(wrong, allowed)}"
            )
        weight, controller = _weight(weight)
        return Loss(
            name,
            _scope(scope),
            weight=weight,
            count=count,
            convention=convention,
            options=options,
            controller=controller,
        )

    return maker


def _weight(weight: Any) -> tuple[Any, Any]:
    """A weight, or its schedule, and what steers it: None, or a controller that begins at 0.001."""
    from equipoise.balance import controllers

    if not isinstance(weight, Call):
        return weight, None
    steering: dict[str, Callable[..., Any]] = {
        "target_max_vio": controllers.TargetMaxVio,
        "drop_rate": controllers.DropRate,
    }
    found = make(weight, {**steering, **_rates()}, "weight controller or schedule")
    return (1e-3, found) if weight.name in steering else (found, None)


def _bias(controller: Callable[..., Any]) -> Callable[..., Any]:
    from equipoise.balance import Bias

    def maker(*, scope: Any = "global", rate: Any = None, **options: Any) -> Any:
        if rate is not None:
            if "rate" not in inspect.signature(controller).parameters:
                raise EquipoiseError("it has no rate: it solves for the bias at every step.")
            steps = isinstance(rate, Call)
            options["rate"] = make(rate, _rates(), "rate schedule") if steps else rate
        return Bias(controller(**options), scope=scope)

    maker.options_for = controller  # type: ignore[attr-defined]
    return maker


def _scope(scope: Any) -> Any:
    from equipoise.balance import Running, Subset

    if isinstance(scope, Call):
        return make(scope, {"running": Running, "subset": Subset}, "scope")
    return scope


def _rates() -> dict[str, Callable[..., Any]]:
    from equipoise.balance import controllers

    return {
        "linear": controllers.linear,
        "cosine": controllers.cosine,
        "warmup": controllers.warmup,
        "constant_then_zero": controllers.constant_then_zero,
        "zero_then_constant": controllers.zero_then_constant,
    }
