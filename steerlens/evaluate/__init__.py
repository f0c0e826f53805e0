"""Held-out effect, controls and uncertainty: methods compared at equal damage."""

from steerlens.evaluate.compare import Comparison, compare
from steerlens.evaluate.cosines import cosine_table
from steerlens.evaluate.reliability import reliability
from steerlens.evaluate.runner import CompareSettings

__all__ = ["CompareSettings", "Comparison", "compare", "cosine_table", "reliability"]
