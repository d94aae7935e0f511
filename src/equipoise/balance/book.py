"""The book of a step: passes, their collectives, the gradient of every loss, the step's end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.balance.layers import Layer
from equipoise.balance.losses import Losses
from equipoise.balance.meters import Meters
from equipoise.balance.passes import Bank, Layout, Pass, Record, Statistic
from equipoise.balance.rows import Rows
from equipoise.balance.scopes import Sequence as SequenceScope
from equipoise.balance.terms import Loss
from equipoise.errors import EquipoiseError
from equipoise.routing import Routing


class Book(Losses, Rows):
    """Counts of one optimizer step and what the losses make of them.

    `accumulation` micro-batches make a step; `ranks` processes share its tokens, whose gradients
    are averaged (`mean`) or summed by the trainer.
    """

    def __init__(
        self,
        banks: Sequence[Bank],
        losses: Sequence[Loss],
        statistics: Sequence[Statistic],
        *,
        device: torch.device,
        group: Any,
        accumulation: int,
        mean: bool,
        paths: Sequence[str],
        top_ks: Sequence[int],
    ) -> None:
        Losses.__init__(self, banks, losses, group=group, paths=paths, top_ks=top_ks)
        Rows.__init__(self)
        self.accumulation, self.mean = accumulation, mean
        self.alone = False
        """This process shares its batch with no other, as attach() was told."""
        self.device = device
        self.layout = Layout(banks, [*statistics, *self._statistics()])
        self.layers: list[Layer] = []
        self.states: dict[tuple[int, int], dict[str, Tensor]] = {key: {} for key in self.objectives}
        self.step = 0
        self.previewing = False
        self.tokens_expected: int | None = None
        self.scaler: Any = None
        self.keep_passes = False
        """Keep the counts of each micro-batch until the step's end."""
        self.meters = Meters(len(losses), self.num_layers, device)
        self._scratch: dict[Any, Tensor] = {}
        self.told: dict[str, Tensor | None] = {}
        """What handle.batch() says of the passes inside."""
        self.passes = 0
        self._begin_step()

    def _begin_step(self) -> None:
        self.passes = 0
        self.kept: list[Tensor] = []
        self._current: Pass | None = None
        self._unresolved: list[Pass] = []
        self._passed: list[Pass] = []
        """Passes whose losses' values have not been taken yet."""
        self._local = self.layout.empty(self.device)
        self._total = self.layout.empty(self.device)
        self._exact: Tensor | None = None
        self._previewed: Tensor | None = None
        self._previews = 0
        self.tokens_expected = None
        for layer in self.layers:
            layer.forget()

    # -- what is counted ------------------------------------------------------------------------

    def scratch(self, scores: Tensor) -> Tensor:
        """Room for the probabilities of one layer, used again by the next."""
        key = (scores.shape, scores.device)
        room = self._scratch.get(key)
        if room is None:  # each device has a backward thread of its own: replace, never clear
            room = torch.empty(scores.shape, device=scores.device)
            self._scratch = {**_others(self._scratch, scores.device), key: room}
        return room

    def value_passes(self) -> None:
        """Take the values of losses over batches from the passes that had a backward pass."""
        for current in self._passed:
            for (term, bank), load_RE in current.shares.items():
                prob_RE = current.means.get(bank)
                if prob_RE is not None:
                    value_R = self.objectives[term, bank].value(load_E=load_RE, prob_E=prob_RE)
                    rows = current.seen[bank]
                    layers = [self.banks[bank].layers[row] for row in rows]
                    self.meters.values_of(term, layers, value_R[rows])
        self._passed.clear()

    def pass_for(self, layer: Layer) -> Pass:
        """The pass that a layer is heard in: a new one where it was heard already."""
        current = self._current
        if current is None or current.closed or layer.index in current.heard:
            self.close()
            self._refuse_unbound()
            self._refuse_one_more()
            current = self._current = Pass(
                self.layout, self.layout.empty(self.device), self.previewing
            )
        current.heard.add(layer.index)
        return current

    def _refuse_unbound(self) -> None:
        """Ranks that each count by themselves would balance by parts: EquipoiseError."""
        if self.group is not None or self.alone:
            return
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            raise EquipoiseError(
                f"{ranks} processes run, but attach() came before torch.distributed was initialised "
                "(where torch.distributed.group.WORLD is still None), so each would count its own "
                "tokens only. Call init_process_group first, or handle.bind(group=...) before the "
                "first micro-batch; attach(..., group=False) means one process by itself."
            )

    def _refuse_one_more(self) -> None:
        """A step that never ends would weigh its losses wrongly: EquipoiseError at once.

        Without losses it may have any number of micro-batches; where none has ever ended, a warning.
        """
        if self.previewing or self.scaler is not None or self.passes < self.accumulation:
            return
        if not self.losses:
            self._warn_of_no_end()
        else:
            raise EquipoiseError(
                f"Micro-batch {self.passes + 1} of an optimizer step begins, but accumulation="
                f"{self.accumulation}. End each step: give attach() the optimizer, or call "
                "handle.step() before its step, or use BalanceCallback; set accumulation= where a "
                "step has more micro-batches; handle.discard() forgets those of a step that was "
                "skipped."
            )

    def _warn_of_no_end(self) -> None:
        if self.step == 0 and self.passes == self.accumulation:
            warnings.warn(
                f"Micro-batch {self.passes + 1} begins, and no balancing step has ended: nothing is "
                "balanced or measured before one does. Give attach() the optimizer, or call "
                "handle.step() before its step, or use BalanceCallback; where a step has several "
                "micro-batches, set accumulation=.",
                stacklevel=2,
            )

    def heard(self, layer: Layer, record: Record, routing: Routing) -> None:
        """A layer was counted; after the last one the counts are sent to the other ranks."""
        if self._needs_segments:
            record.segment_T, record.num_segments = self._segments(record)
        if len(record.of.heard) == self.num_layers:
            self.close()

    def close(self) -> None:
        """End the pass under way: add it to the step, start its collective."""
        current = self._current
        if current is None or current.closed:
            return
        current.closed = True
        self._current = None
        if current.preview:
            self._previews += 1
            self._previewed = (
                current.flat if self._previewed is None else self._previewed + current.flat
            )
            return
        self.passes += 1
        self._local += current.flat
        if self.keep_passes:
            self.kept.append(current.flat)
        self.meters.micro(self.layout, current.flat)
        if self.synced:
            current.synced = current.flat
            if self.group is not None and self.ranks > 1:
                current.synced = current.flat.clone()
                current.work = dist.all_reduce(current.synced, group=self.group, async_op=True)
        self._unresolved.append(current)
        self._passed.append(current)

    def resolve(self, until: Pass | None = None) -> None:
        """Take the collectives' results, in order, and let each scope see each pass once."""
        while self._unresolved:
            current = self._unresolved.pop(0)
            if current.work is not None:
                current.work.wait()
                current.work = None
            if current.synced is not None:
                self._total += current.synced
            current.loads = {}
            for (term, bank), objective in self.objectives.items():
                scope = self.scopes[term]
                if objective.kind != "load" or isinstance(scope, SequenceScope):
                    continue
                flat = current.synced if scope.synced else current.flat
                assert flat is not None
                counts = self.layout.counts(flat, self.statistic(term, bank), bank)
                current.loads[term, bank] = scope.at_pass(self.states[term, bank], counts)
            if current is until:
                return

    def whole(self) -> bool:
        """Whether the step saw its micro-batches; with a GradScaler that skipped steps, several."""
        if self.scaler is not None:
            return self.passes % self.accumulation == 0
        return self.passes == self.accumulation

    def whole_step(self) -> Tensor:
        """Counts of the whole step, from a preview or because all its passes have been seen."""
        if self._exact is not None:
            return self._exact
        if self.passes < self.accumulation:
            raise EquipoiseError(
                f'scope="exact": {self.passes} of {self.accumulation} micro-batches of the step '
                "were seen when the first backward pass asked for the load of all. Run them once "
                "within `with handle.preview():` before, or all forward passes before the first "
                'backward pass; or take scope="global".'
            )
        self.resolve()
        return self._total

    # -- preview and the step's end ---------------------------------------------------------------

    @contextmanager
    def preview(self) -> Iterator[None]:
        """Count passes for the step to come, without training on them."""
        self.close()
        self._previewed, self._previews = None, 0
        self.previewing = True
        try:
            yield
            self.close()
        finally:
            self.previewing = False
            self._current = None
        if self._previews != self.accumulation:
            raise EquipoiseError(
                f"preview(): {self._previews} micro-batches were run inside, but accumulation="
                f"{self.accumulation}: a preview holds all micro-batches of the step to come, once."
            )
        found = self._previewed if self._previewed is not None else self.layout.empty(self.device)
        self._previewed = None
        if self.group is not None and self.ranks > 1:
            dist.all_reduce(found, group=self.group)
        self._exact = found

    def counted(self) -> Tensor:
        """Counts of the step on all ranks, flat."""
        self.close()
        self.resolve()
        if not self.synced and self.group is not None and self.ranks > 1:
            total = self._local.clone()
            dist.all_reduce(total, group=self.group)
            return total
        return self._total if self.synced else self._local

    def drop_step(self) -> None:
        """Forget the step under way, once the other ranks have had their part of it."""
        self.close()
        self.resolve()
        for state in self.states.values():
            state.pop("buffer", None)
        self.meters.reset()
        self._begin_step()

    def end_step(self, total: Tensor) -> None:
        """Show the step's counts to the scopes, and begin the next one."""
        for (term, bank), objective in self.objectives.items():
            scope = self.scopes[term]
            if objective.kind == "load" and not isinstance(scope, SequenceScope):
                counts = self.layout.counts(total, self.statistic(term, bank), bank)
                scope.at_step(self.states[term, bank], counts)
        self.step += 1
        self._begin_step()

    def set_aside(self) -> dict[str, Any]:
        """The step under way, put away so that passes of no consequence can run."""
        self.close()
        self.resolve()
        kept = {name: vars(self)[name] for name in _OF_STEP}
        kept["states"] = {key: dict(state) for key, state in self.states.items()}
        kept["generators"] = {s: g.get_state() for s, g in self.generators.items()}
        self.meters = Meters(len(self.losses), self.num_layers, self.device)
        for key in self.states:
            self.states[key].pop("buffer", None)
        self._begin_step()
        return kept

    def take_up(self, kept: dict[str, Any]) -> None:
        """Go on with a step that was set aside."""
        self._begin_step()
        generators = kept.pop("generators")
        for name, value in kept.items():
            setattr(self, name, value)
        for seed, state in generators.items():
            self.generators[seed].set_state(state)


def _others(rooms: dict[Any, Tensor], device: torch.device) -> dict[Any, Tensor]:
    return {key: room for key, room in rooms.items() if key[1] != device}


_OF_STEP = (
    "passes",
    "kept",
    "_current",
    "_unresolved",
    "_passed",
    "_local",
    "_total",
    "_exact",
    "_previewed",
    "tokens_expected",
    "meters",
)
"""What belongs to the step under way."""
