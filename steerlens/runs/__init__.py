"""What a command leaves behind: recorded, resumed, read, shown as a page."""

from steerlens.runs.html_report.figures import save_figures
from steerlens.runs.html_report.page import report
from steerlens.runs.reading import Run, read_run

__all__ = ["Run", "read_run", "report", "save_figures"]
