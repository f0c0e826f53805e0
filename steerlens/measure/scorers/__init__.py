"""Scorers of generated text: texts with their prompts in, a number each out."""

from steerlens.measure.scorers.classifiers import Classifier, Probe
from steerlens.measure.scorers.endpoint import Endpoint
from steerlens.measure.scorers.judge import Agreement, Judge, Ratings
from steerlens.measure.scorers.likelihood import Choice, Concept, Description, Logprob
from steerlens.measure.scorers.named import SCORERS, check_scorers, scorers_of
from steerlens.measure.scorers.surface import Distinct, Repeated, Words, ended, length, script
from steerlens.measure.scorers.written import Scorer, Written, scorer_name

__all__ = [
    "SCORERS",
    "Agreement",
    "Choice",
    "Classifier",
    "Concept",
    "Description",
    "Distinct",
    "Endpoint",
    "Judge",
    "Logprob",
    "Probe",
    "Ratings",
    "Repeated",
    "Scorer",
    "Words",
    "Written",
    "check_scorers",
    "ended",
    "length",
    "scorer_name",
    "scorers_of",
    "script",
]
