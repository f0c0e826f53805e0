"""Circuits: which heads and MLPs carry the effect, steered against unsteered."""

from steerlens.circuits.answers import Answers, contrast_answers, item_answers
from steerlens.circuits.comparison import Circuits, compare_circuits
from steerlens.circuits.components import Component
from steerlens.circuits.graphs import (
    Contrast,
    Graph,
    Reader,
    Scores,
    attribute,
    edge_readers,
    edge_table,
    make_contrast,
    make_graph,
    run_edges,
    run_nodes,
)
from steerlens.circuits.interventions import Intervention
from steerlens.circuits.nulls import null_interventions
from steerlens.circuits.patterns import Patterns, Projections, attention_patterns, token_projections
from steerlens.circuits.prompts import Prompts, make_prompts
from steerlens.circuits.readers import Readers, check_steered, find_readers
from steerlens.circuits.writers import Writers, find_writers

__all__ = [
    "Answers",
    "Circuits",
    "Component",
    "Contrast",
    "Graph",
    "Intervention",
    "Patterns",
    "Projections",
    "Prompts",
    "Reader",
    "Readers",
    "Scores",
    "Writers",
    "attention_patterns",
    "attribute",
    "check_steered",
    "compare_circuits",
    "contrast_answers",
    "edge_readers",
    "edge_table",
    "find_readers",
    "find_writers",
    "item_answers",
    "make_contrast",
    "make_graph",
    "make_prompts",
    "null_interventions",
    "run_edges",
    "run_nodes",
    "token_projections",
]
