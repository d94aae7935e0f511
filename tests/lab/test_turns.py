"""Step times taken in turns: every config in every round, kept, and compared round by round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise.lab import Config, turns
from equipoise.lab.turns import Turns, measure


def test_every_config_takes_a_step_in_every_round(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "ROUNDS", 2)
    plain, sign = configure(), configure(balance="sign(rate=0.01)")
    path = tmp_path / "times.json"
    found = measure([plain, sign, plain.change({"seed": 3})], path)
    assert len(found.seconds) == 2
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.seconds.values())
    assert Turns.read(path) == found
    before = path.read_bytes()
    measure([sign], path)
    assert path.read_bytes() == before
    again = measure([sign, configure(balance="quantile")], path)
    assert len(again.seconds) == 2
    assert again.of(plain) is None
    assert again.ratio(sign, plain) is None


def test_ratios_are_of_the_same_round(configure: Callable[..., Config]) -> None:
    base, other = configure(), configure(balance="sign(rate=0.01)")
    keys = [turns._key(config) for config in (base, other)]
    noise = np.random.default_rng(0).lognormal(0, 1, 9)
    found = Turns({}, {keys[0]: (2 * noise).tolist(), keys[1]: (3 * noise).tolist()})
    assert found.ratio(other.change({"seed": 1}), base) == pytest.approx((1.5, 0))


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text("[1]")
    with pytest.raises(EquipoiseError, match=r"times\.json holds no step times"):
        Turns.read(tmp_path / "times.json")
