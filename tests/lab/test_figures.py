"""Figures that runs and experiments draw."""

from __future__ import annotations

from typing import Any

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


def test_a_name_has_one_colour_in_all_panels() -> None:
    figure, axes = figures.canvas(2)
    line = ([0.0, 1.0], [1.0, 2.0])
    panels: list[dict[str, Any]] = [{"a": line, "b": line}, {"c": line, "b": line, "a": line}]
    names = [name for panel in panels for name in panel]
    for axis, panel in zip(axes[0], panels, strict=True):
        figures.lines(axis, panel, title="", x="", y="", names=names)
    colours = [{x.get_label(): x.get_color() for x in axis.get_lines()} for axis in axes[0]]
    assert {**colours[0], **colours[1]} == {**colours[1], **colours[0]}
    assert len(set(colours[1].values())) == 3
    figures.legend(figure, axes[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
