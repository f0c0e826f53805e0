"""Circuits: which heads and MLPs carry the effect, steered against unsteered."""

from steerlens.circuits.answers import Answers, contrast_answers, item_answers
from steerlens.circuits.comparison import Circuits, compare_circuits
from steerlens.circuits.components import Component, Prompts, make_prompts
from steerlens.circuits.interventions import Intervention
from steerlens.circuits.patterns import Patterns, Projections, attention_patterns, token_projections
from steerlens.circuits.random_control import random_intervention
from steerlens.circuits.readers import Readers, find_readers
from steerlens.circuits.writers import Writers, find_writers

__all__ = [
    "Answers",
    "Circuits",
    "Component",
    "Intervention",
    "Patterns",
    "Projections",
    "Prompts",
    "Readers",
    "Writers",
    "attention_patterns",
    "compare_circuits",
    "contrast_answers",
    "find_readers",
    "find_writers",
    "item_answers",
    "make_prompts",
    "random_intervention",
    "token_projections",
]
