"""The sequences of a run: announced by a runner, or worked out from the passes of a user's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.capture.buffers import Arena
from equipoise.capture.passes import Inferred, RunSequence, batch_shape, mask_of, past_length
from equipoise.errors import EquipoiseError


class SequenceBook:
    """Gives sequences their numbers, and forgets them when they are done."""

    def __init__(self) -> None:
        self._next = 0
        self._known: dict[int, RunSequence] = {}
        self._live: list[RunSequence] = []

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, number: int) -> RunSequence:
        try:
            return self._known[number]
        except KeyError:
            raise EquipoiseError(f"No sequence {number}: announce it with add_sequence.") from None

    def new(self, values: dict[str, Any], codes: Any = None) -> RunSequence:
        """A sequence with these labels, and the role code of each position."""
        sequence = self._numbered(values, codes)
        self._known[sequence.number] = sequence
        return sequence

    def _numbered(self, values: dict[str, Any], codes: Any = None) -> RunSequence:
        self._next += 1
        return RunSequence(self._next - 1, values, codes)

    def infer(self, arguments: Mapping[str, Any], shape: tuple[int, int] | None) -> Inferred:
        """What the arguments of a pass say: rows are sequences, a cache goes on with the last ones."""
        batch, width = shape or (1, 0)
        mask = mask_of(arguments)
        past = past_length(arguments, width, mask) if shape is not None else 0
        encoded = arguments.get("encoder_outputs") is not None and shape is None
        if not (past or encoded) or (len(self._live) != batch and not encoded):
            self._live = [self._numbered({}) for _ in range(batch)]
        return Inferred(self._live, past, None if mask is None else _kept(mask))

    def infer_decoder(
        self, arguments: Mapping[str, Any]
    ) -> tuple[Inferred, tuple[int, int]] | None:
        """The same for the decoder's own tokens; they belong to the sequences of the encoder's."""
        given = {
            "input_ids": arguments.get("decoder_input_ids"),
            "inputs_embeds": arguments.get("decoder_inputs_embeds"),
        }
        shape = batch_shape(given)
        if shape is None:
            return None
        mask = mask_of(arguments, "decoder_attention_mask")
        past = past_length(arguments, shape[1], mask)
        return Inferred(self._live, past, None if mask is None else _kept(mask)), shape

    def forget_written(self, sequences: Sequence[RunSequence]) -> None:
        """Drop those that are done, once their window was handed over: a run may be long."""
        for sequence in sequences:
            if sequence.done:
                self._known.pop(sequence.number, None)


def _kept(mask_BS: Tensor) -> Tensor:
    """A copy of a mask on the host, bool: the caller may write over it in the next pass."""
    return mask_BS.detach().to("cpu", torch.bool, non_blocking=True, copy=True)


def keep(arena: Arena, sequences: Sequence[RunSequence]) -> None:
    """Have these sequences written with the arena's window, each once."""
    if sequences is arena.kept:
        return
    arena.kept = sequences
    for sequence in sequences:
        if sequence.number not in arena.numbers:
            arena.numbers.add(sequence.number)
            arena.sequences.append(sequence)


def drop_unfinished(arena: Arena) -> None:
    """Leave out what was under way: questions without a result, sequences that did not get to run.

    A resumed run will ask them again.
    """
    lost = {
        sequence.number
        for one in arena.passes
        if any(_unfinished(sequence) for sequence in one.describe.sequences)
        for sequence in one.describe.sequences
    }
    arena.passes = [
        one for one in arena.passes if not any(s.number in lost for s in one.describe.sequences)
    ]
    ran = {sequence.number for one in arena.passes for sequence in one.describe.sequences}
    arena.sequences = [s for s in arena.sequences if s.number in ran or s.done]


def _unfinished(sequence: RunSequence) -> bool:
    return sequence.values.get("question") is not None and not sequence.done
