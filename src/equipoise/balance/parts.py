"""What a term besides losses and biases brings to a handle: something that acts at a step's end."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Part(Protocol):
    """One term at work on the layers of a handle."""

    name: str
    """In checkpoints."""

    def before(self) -> None:
        """A step ends: its counts are known, biases have not moved yet."""
        ...

    def after(self, counts: list[Tensor], step: int) -> None:
        """Biases and router gradients are done; `counts` are selections on all ranks, [E] a layer."""
        ...

    def forget(self) -> None:
        """The step under way will not come: drop what was gathered of it."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last step, by stable names."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        ...

    def detach(self) -> None:
        """Take off what lies on the model."""
        ...
