"""Tables to figures and pages: for notebooks, HTML files, PNG, SVG and PDF."""

from steerlens.plots.behaviours import behaviour, behaviour_by_coefficient
from steerlens.plots.circuits import circuit_graph, components
from steerlens.plots.figure import Figure
from steerlens.plots.history import training
from steerlens.plots.layers import boundary, layer_profile
from steerlens.plots.methods import comparison
from steerlens.plots.pages import (
    Page,
    attention_page,
    projection_page,
    reading_page,
    token_page,
    token_table_html,
)
from steerlens.plots.plane import differences, loss_geometry
from steerlens.plots.sweeps import dose_response, heat_maps, tradeoff

__all__ = [
    "Figure",
    "Page",
    "attention_page",
    "behaviour",
    "behaviour_by_coefficient",
    "boundary",
    "circuit_graph",
    "comparison",
    "components",
    "differences",
    "dose_response",
    "heat_maps",
    "layer_profile",
    "loss_geometry",
    "projection_page",
    "reading_page",
    "token_page",
    "token_table_html",
    "tradeoff",
    "training",
]
