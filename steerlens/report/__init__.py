"""A run, or several, as one HTML page that opens from a disk and asks no network for anything."""

from steerlens.report.page import report
from steerlens.report.reading import Run, read_run

__all__ = ["Run", "read_run", "report"]
