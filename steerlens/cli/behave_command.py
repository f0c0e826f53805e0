"""`steerlens behave`: what a vector makes the model write, scored."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import ModelCommand
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.printing import note, print_behaviour, progress_of
from steerlens.cli.vector_commands import load_with_model
from steerlens.errors import InputError
from steerlens.files import jsonl_text
from steerlens.progress import silent

OPEN = "open"
"""What `--prompts` is without a file: the shipped questions."""


@dataclass(frozen=True, kw_only=True)
class Behave(FolderCommand, ModelCommand):
    """What the steered model writes, scored, by coefficient."""

    vector: str | None = None
    coefficients: str = "-80%,80%"
    prompts: str = OPEN
    chat: bool = False
    layers: str | None = None
    samples: int = 4
    max_new_tokens: int = 40
    greedy: bool = False
    scorers: str | None = None
    descriptions: str | None = None
    pairs: str | None = None
    group: str = "group"
    columns: str | None = None
    form: str | None = None
    positions: str = "all"
    nulls: int = 0
    examples: int = 2
    personas: str | None = None
    model: str | None = None

    def measure(self) -> None:
        from steerlens.cli.task import request_of

        strengths = opt.strengths_of(self.coefficients)
        personas = _two("personas", self.personas)
        descriptions = _two("descriptions", self.descriptions)
        sl.steering.cache_positions.check_positions(self.positions)
        path = Path(str(self.vector))
        vector = sl.export.gguf_file.read_vector(path)
        if self.layers is None or len(vector) == 1:  # else one of its hooks may have a boundary
            for strength in strengths:
                sl.steering.steps(vector, strength)
        prompts, groups = self._prompts()
        pairs = self._pairs(vector)
        names = self._scorers(pairs)
        sl.measure.scorers.check_scorers(names, pairs, descriptions)
        vector, model = load_with_model(path, self.model, self.load)
        if self.prompts == OPEN and getattr(model.tokenizer, "chat_template", None):
            prompts = [sl.data.entries.turns(prompt) for prompt in prompts]
        hook_names: tuple[str, ...] = (sl.measure.interventions.joined_hooks(vector),)
        if self.layers is not None:
            hook_names = sl.resolve_hooks(model, self.layers)
        data: dict[str, Any] = {
            "hook_names": hook_names,
            "pairs": None if pairs is None else opt.pairs_record(pairs),
        }
        resolved: dict[str, Any] = {
            "vector": opt.vector_record(path),
            "prompts": [
                prompt if isinstance(prompt, str) else [turn._asdict() for turn in prompt]
                for prompt in prompts
            ],
            "scorers": names,
        }
        request = request_of("behave", self, model, data, **resolved)
        with self.opened(request) as run:
            with progress_of() as progress:
                result = sl.behaviour(
                    model,
                    vector,
                    prompts,
                    coefficients=strengths,
                    scorers=sl.measure.scorers.scorers_of(
                        *(names, model, pairs),
                        descriptions=descriptions,
                        batch_size=self.batch_size,
                    ),
                    pairs=pairs,
                    layers=self.layers,
                    samples=1 if self.greedy else self.samples,
                    max_new_tokens=self.max_new_tokens,
                    positions=self.positions,
                    groups=groups,
                    n_null=self.nulls,
                    personas=personas,
                    seed=None if self.greedy else self.seed,
                    batch_size=self.batch_size,
                    progress=progress,
                    checkpoint=run.parts,
                )
                tables = {"behaviour": result.table}
                # Which tokens a condition, or thinking, steers is decided as the model runs.
                is_known = not any(name in self.positions for name in ("think", "answer"))
                is_at_one = len(vector) == 1 or self.layers is not None
                if is_at_one and is_known and vector.condition is None:
                    tables |= self._tokens(model, vector, prompts, result)
            run.write(tables, vector, texts={"generations.jsonl": jsonl_text(result.records())})
        print_behaviour(result.table)
        run.note(f"{len(result.generations)} texts")

    def _tokens(self, model: Any, vector: Any, prompts: list[Any], result: Any) -> dict[str, Any]:
        """The tokens of the first prompts' texts, steered and unsteered; nothing where none is."""
        import pandas as pd

        from steerlens.runs.contents import text_name

        # What is generated is the continuation of a text that is looked at.
        positions = re.sub("generated|own", "continuation", self.positions)
        texts = result.generations
        is_shown = texts.subject.isin(["steered", "unsteered"]) & texts.ids.map(bool)
        steered_at = texts.hook_name[texts.subject == "steered"]
        tables = []
        for (hook_name, strength), rows in texts[
            is_shown & (texts.prompt <= self.examples)
        ].groupby(["hook_name", "strength"], sort=False):
            asked = [sl.engine.tokenize_prompt(model, prompts[i - 1]) for i in rows.prompt]
            written = zip(asked, map(tuple, rows.ids), strict=True)
            tables.append(
                sl.token_damage(
                    model,
                    [replace(prompt, continuation=ids) for prompt, ids in written],
                    vector,
                    layer=hook_name or next(iter([*steered_at, *vector])),
                    coefficients=[strength],
                    steered_positions=positions,
                    ids=[text_name(row.prompt, row.sample, strength) for row in rows.itertuples()],
                    batch_size=self.batch_size,
                    progress=silent,
                )
            )
        return {"tokens": pd.concat(tables, ignore_index=True)} if tables else {}

    def _prompts(self) -> tuple[list[Any], list[str] | None]:
        """What is written after, and the groups."""
        if self.prompts == OPEN:
            read_half = sl.data.open_questions
            return [*read_half("choice"), *read_half("confirmation")], None
        read = sl.data.read_prompts(Path(self.prompts))
        groups = [of.group or f"prompt {i}" for i, of in enumerate(read, 1)]
        return [sl.data.entries.turns(of.prompt) if self.chat else of.prompt for of in read], groups

    def _pairs(self, vector: Any) -> Any:
        source = self.pairs
        if source is None and vector.origin.dataset in sl.data.dataset_names():
            source = vector.origin.dataset
        if source is None:
            return None
        how: dict[str, Any] = {"group": self.group, "columns": self.columns, "form": self.form}
        return opt.pairs_of(source, **how)[1]  # of a shipped dataset the part that is measured on

    def _scorers(self, pairs: Any) -> tuple[str, ...]:
        from steerlens.measure.behaviours import COHERENCE, CONCEPT

        if self.scorers is not None:
            return tuple(name.strip() for name in self.scorers.split(","))
        if pairs is None:
            note("no --pairs: the concept is not scored, coherence alone")
            return COHERENCE
        return (*COHERENCE, CONCEPT)


def _two(option: str, text: str | None) -> tuple[str, str] | None:
    """The texts of both ends of the concept. Raises `InputError` where they are not two."""
    if text is None:
        return None
    positive, _, negative = text.partition("|")
    if not (positive.strip() and negative.strip()):
        raise InputError(f"expected --{option} POSITIVE|NEGATIVE, got {text!r}")
    return positive.strip(), negative.strip()
