"""The record of a run: written by `capture`, read by everything else."""

from equipoise.trace.merge import open_trace
from equipoise.trace.schema import Layer, Manifest
from equipoise.trace.trace import TokenBatch, Trace, Window

__all__ = ["Layer", "Manifest", "TokenBatch", "Trace", "Window", "open_trace"]
