"""Contrastive pairs and preference items: read, checked, shipped."""

from steerlens.data.entries import Card
from steerlens.data.forms import FORMS
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.pairs import ContrastivePair, ContrastivePairs
from steerlens.data.prompts import Message, Prompt, render, set_rendering
from steerlens.data.questions import OpenPrompt, open_questions, read_prompts
from steerlens.data.shipped import dataset_card, dataset_names, neutral_texts

__all__ = [
    "FORMS",
    "Card",
    "ContrastivePair",
    "ContrastivePairs",
    "Message",
    "OpenPrompt",
    "PreferenceItem",
    "PreferenceItems",
    "Prompt",
    "dataset_card",
    "dataset_names",
    "neutral_texts",
    "open_questions",
    "read_prompts",
    "render",
    "set_rendering",
]
