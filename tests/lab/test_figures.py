"""Figures that runs and experiments draw."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.lab import figures


@pytest.mark.parametrize("experts", [2, 16, 64, 256])
def test_every_expert_has_a_colour_of_its_own_in_the_shares(experts: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    figure, axes = figures.canvas()
    shares_NE = np.full((3, experts), 1 / experts)
    figures.shares(axes[0, 0], [1.0, 2.0, 3.0], shares_NE, title="layer 0")
    colours = {tuple(area.get_facecolor()[0]) for area in axes[0, 0].collections}
    plt.close(figure)
    assert len(colours) == experts
