"""Compiling never stops a measurement for want of a place to cache in."""

from __future__ import annotations

from types import SimpleNamespace

import numba
import pytest

from equipoise.metrics import _compile


def add_one(x):
    return x + 1


def test_without_a_cache_folder_the_loop_is_compiled_uncached(monkeypatch):
    real = numba.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(_compile, "numba", SimpleNamespace(njit=njit))
    assert _compile.kernel(add_one)(1) == 2


def test_a_full_disk_does_not_stop_the_call():
    def full(*_):
        raise OSError(28, "No space left on device")

    dispatcher = SimpleNamespace(_cache=SimpleNamespace(save_overload=full))
    _compile._forgive_unwritable(dispatcher)
    assert dispatcher._cache.save_overload("signature", "compiled") is None


def test_other_errors_of_the_cache_are_not_hidden():
    def broken(*_):
        raise TypeError("not picklable")

    dispatcher = SimpleNamespace(_cache=SimpleNamespace(save_overload=broken))
    _compile._forgive_unwritable(dispatcher)
    with pytest.raises(TypeError):
        dispatcher._cache.save_overload("signature", "compiled")


def test_a_dispatcher_without_a_cache_is_left_alone():
    _compile._forgive_unwritable(SimpleNamespace())
