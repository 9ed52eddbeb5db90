"""The invariant features of many adapters, for many folds: those of `fedloop probe-kit`."""

from __future__ import annotations

from fedloop.kit.features import Study, coordinates

__all__ = ["Study", "coordinates"]
