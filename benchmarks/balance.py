"""What balancing costs a training step: `python benchmarks/balance.py [--steps 3] [--json FILE]`.

An OLMoE-shaped model (16 MoE layers, 64 experts, top-8; narrower, so that it fits, which makes the
share of balancing larger, not smaller) with random weights trains on one CPU thread: batch 4 x 512,
AdamW. The cost is accounted for inside the run: processor time spent in a term's code (counting,
collectives, gradients, the bias in the router's top-k, the step's end) over that of the rest of the
same steps. transformers' own loss (`output_router_logits=True`) is run forward and backward on the
same logits in the same steps, and counted the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import make_model, report
from transformers import OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from equipoise import balance
from equipoise.balance import Bias, Loss
from equipoise.balance.attach import Handle
from equipoise.balance.layers import Layer
from equipoise.balance.roots import Roots

CLOCK = time.thread_time


def terms() -> dict[str, list[Any]]:
    """What is measured, by name."""
    found: dict[str, list[Any]] = {
        'Loss("switch", "global") + Bias(Sign)': [Loss("switch", "global"), Bias(balance.Sign())]
    }
    for scope in balance.SCOPES:
        if scope != "exact":
            found[f'Loss("switch", "{scope}")'] = [Loss("switch", scope)]
    for name in ("squared", "importance", "z", "entropy", "score_variance", "router_orthogonality"):
        found[f'Loss("{name}")'] = [Loss(name)]
    for name in ("group", "communication"):
        found[f'Loss("{name}")'] = [Loss(name, options={"groups": 8})]
    found['Loss("switch", count="unbiased")'] = [Loss("switch", count="unbiased")]
    controllers = (
        balance.Sign(),
        balance.Proportional(),
        balance.MomentumTanh(),
        balance.Quantile(),
        balance.QuantileHistogram(adaptive=True),
    )
    for controller in controllers:
        found[f"Bias({type(controller).__name__})"] = [Bias(controller)]
    return found


class Meter:
    """Processor time spent in some functions."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextlib.contextmanager
    def around(self, owner: Any, *names: str) -> Iterator[None]:
        """Replace functions of a class by ones that are timed."""
        kept = {name: getattr(owner, name) for name in names}
        for name, function in kept.items():
            setattr(owner, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth, begin = 1, CLOCK()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += CLOCK() - begin
                self._depth = 0

        return timed


def router_extra(model: OlmoeForCausalLM, handle: Handle, hidden: list[torch.Tensor]) -> float:
    """Seconds that the biases add to all routers' forward passes: with them minus without."""
    seconds = {True: 0.0, False: 0.0}
    for biased in (False, True, False, True):
        for layer, hidden_TD in zip(model.model.layers, hidden, strict=True):
            gate = layer.mlp.gate
            forward = gate.forward if biased else type(gate).forward.__get__(gate)
            begin = CLOCK()
            forward(hidden_TD)
            seconds[biased] += CLOCK() - begin
    return max(seconds[True] - seconds[False], 0.0) / 2


def own_loss(logits: list[torch.Tensor]) -> float:
    """Seconds of transformers' own balancing loss, forward and backward."""
    leaves = tuple(x.detach().requires_grad_() for x in logits)
    begin = CLOCK()
    load_balancing_loss_func(leaves, 64, 8).backward()
    return CLOCK() - begin


def measure(
    model: OlmoeForCausalLM, given: list[Any], steps: int, batch: int
) -> tuple[float, float]:
    """Shares of the step's time: of the terms, and of transformers' own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    meter, rest, own, extra = Meter(), 0.0, 0.0, 0.0
    hidden: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def keep(_: Any, args: tuple[torch.Tensor], out: tuple[torch.Tensor, ...]) -> None:
        hidden.append(args[0].detach())
        logits.append(out[0].detach())

    watching = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    with (
        meter.around(Layer, "begin", "gradient", "_arrived"),
        meter.around(Handle, "step"),
        meter.around(Roots, "_begin", "_end"),
    ):
        handle = balance.attach(model, *given, optimizer=optimizer)
        for step in range(-1, steps):
            ids = torch.randint(0, 8192, (batch, 512))
            hidden.clear()
            logits.clear()
            before, begin = meter.seconds, CLOCK()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 0:
                meter.seconds = 0.0
                continue
            rest += CLOCK() - begin - (meter.seconds - before)
            own += own_loss(logits)
            if handle.biases:
                with torch.no_grad():
                    extra += router_extra(model, handle, hidden)
    for hook in watching:
        hook.remove()
    handle.detach()
    rest -= extra
    return (meter.seconds + extra) / rest, own / rest


def main() -> None:
    """Measure every term and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", help="terms whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(args.width).train()
    rows = []
    for name, given in terms().items():
        if args.only and args.only not in name:
            continue
        share, own = measure(model, given, args.steps, args.batch)
        rows.append(
            {
                "term": f"`{name}`",
                "share of the step": f"{share:.2%}",
                "transformers' own loss, same steps": f"{own:.2%}",
            }
        )
        print(rows[-1], flush=True)
    report("Balancing", rows, "python benchmarks/balance.py", args.json)


if __name__ == "__main__":
    main()
