from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.report import write_figures
from equipoise.trace import Trace
from tests.report.conftest import HOSTILE


def test_without_matplotlib_the_error_names_the_extra(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EquipoiseError, match=re.escape('pip install "equipoise[figures]"')):
        write_figures(trace, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.fixture(scope="module")
def written(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("figures")
    return {path.name: path for path in write_figures(trace, folder / "new" / "folder")}


@pytest.mark.parametrize("name", ["load", "max_vio", "lorenz", "accuracy"])
def test_each_figure_is_written_as_png_and_svg_and_is_not_blank(
    written: dict[str, Path], name: str
) -> None:
    from matplotlib.image import imread

    pixels = imread(written[f"{name}.png"])
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.03
    assert (pixels[..., :3] > 0.99).all(-1).mean() > 0.2, "the background is light"
    assert written[f"{name}.svg"].read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_a_never_selected_expert_has_its_own_colour(written: dict[str, Path]) -> None:
    from matplotlib.image import imread

    pixels = imread(written["load.png"])[..., :3]
    magenta = np.abs(pixels - np.array([0xD1, 0x00, 0x6C]) / 255).max(-1) < 0.02
    assert magenta.sum() > 500


def test_names_with_markup_or_dollars_stay_text(written: dict[str, Path]) -> None:
    text = written["accuracy.svg"].read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in text
    assert "$x$" in text


def test_a_dense_trace_has_accuracy_only_and_an_empty_one_nothing(
    dense: Trace, empty: Trace, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert [p.name for p in write_figures(dense, tmp_path)] == ["accuracy.png", "accuracy.svg"]
    assert write_figures(empty, tmp_path) == []
