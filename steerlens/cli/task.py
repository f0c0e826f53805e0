"""What a command works on and what it writes: pairs, model and hooks; the run that is recorded."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import steerlens as sl
from steerlens.cli.options import pairs_record, vector_record
from steerlens.cli.printing import keep_warning, note, progress_of, warned
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions import Differences, Directions
from steerlens.directions.fitting import check_pairs, default_position
from steerlens.directions.methods import method_of
from steerlens.engine.labels import OWN_TOKENS
from steerlens.engine.positions import Position, as_position
from steerlens.errors import FileError, InputError
from steerlens.measure.interventions import joined_hooks, position_of
from steerlens.measure.study import Study
from steerlens.models import DEFAULT_MODEL, HookedModel, provenance
from steerlens.progress import Progress
from steerlens.runs.record import write_run
from steerlens.runs.unfinished import Parts
from steerlens.steering import SteeringVector

DATA = frozenset(
    {"model", "pairs", "test_pairs", "max_pairs", "max_train_pairs", "layers", "layer", "items"}
    | {"max_items", "off_target"}
)
"""Options that name a model, data or hooks: a request has what they name."""


def request_of(
    name: str, command: Any, model: HookedModel, data: Mapping[str, Any], **resolved: Any
) -> dict[str, Any]:
    """What a run's record says was asked for; `resolved` are values that are not as given."""
    settings = {k: v for k, v in command.recorded_options().items() if k not in DATA}
    head = {"command": name, "model": provenance(model).to_dict(), **data}
    return head | settings | resolved


@dataclass(frozen=True)
class Task:
    """What the options of a command name; a `vector` is measured in place of what is fitted."""

    command: Any
    model: HookedModel
    fit_on: ContrastivePairs
    measure_on: ContrastivePairs
    hook_names: tuple[str, ...]
    position: Position
    vector: SteeringVector | None = None

    def request(self, name: str, **resolved: Any) -> dict[str, Any]:
        """As `request_of`, with the pairs, the hooks and the position."""
        vector, hashes = self.vector, self.fit_on.prompt_hashes
        resolved = {"position": self.position, **resolved}
        data: dict[str, Any] = {}
        if vector is None:
            data["fitted_on"] = pairs_record(self.fit_on)
        else:
            hashes, record = vector.origin.pair_hashes, vector_record(Path(self.command.vector))
            resolved |= {"method": vector.origin.method, "vector": record}
        data |= {
            "measured_on": pairs_record(self.measure_on),
            "n_pairs_fitted_on": self.measure_on.count_among(hashes),
            "hook_names": self.hook_names,
        }
        return request_of(name, self.command, self.model, data, **resolved)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Note what is fitted or given, then show the progress of the block."""
        pairs, method = self.fit_on, self.command.method
        self.command.note_read(pairs, self.measure_on)
        fitting = f"Fitting {method} on {len(pairs)} pairs of {pairs.name}"
        note(fitting if self.vector is None else f"Measuring {self.vector!r}")
        with progress_of() as progress:
            yield progress

    def fit(
        self,
        progress: Progress,
        *,
        layers: str | None = None,
        differences: Differences | None = None,
    ) -> Directions:
        """Directions at `layers` (those of the options), from `differences` if they are there."""
        return sl.fit(
            self.model,
            self.fit_on,
            method=self.command.method,
            layers=self.command.layers if layers is None else layers,
            position=self.position,
            differences=differences,
            own_tokens=getattr(self.command, "own_tokens", OWN_TOKENS),
            **self.settings(progress),
        )

    def study(self, progress: Progress, *, parts: Parts | None = None, **settings: Any) -> Study:
        """What the directions (kept in `parts`, or fitted), or the vector, are measured on."""
        settings |= {"checkpoint": parts, **self.settings(progress)}
        if self.vector is not None:
            return sl.Study(self.model, self.measure_on, self.vector, **settings)
        fit, layers = partial(self.fit, progress), self.command.layers
        directions = fit() if parts is None else parts.directions(fit)
        return sl.Study(self.model, self.measure_on, directions, layers=layers, **settings)

    def vector_at(
        self, progress: Progress, directions: Directions, layers: str, strengths: Sequence[str]
    ) -> SteeringVector:
        """The directions at `layers` as a vector that knows what the strengths are shares of."""
        units = {sl.steering.parse_coefficient(strength).unit for strength in strengths}
        table = None
        if units != {"residual"}:
            settings = {"layers": layers, **self.settings(progress)}
            study = sl.Study(self.model, self.measure_on, directions, **settings)
            table = study.boundary().layers if "boundary" in units else study.layers
        return SteeringVector.from_directions(
            *(self.model, directions),
            layers=layers,
            layer_table=table,
            dataset=self.fit_on.name,
        )

    def settings(self, progress: Progress) -> dict[str, Any]:
        """What every measurement is given besides its own."""
        seed, batch_size = self.command.seed, self.command.batch_size
        return {"seed": seed, "batch_size": batch_size, "progress": progress}


def prepare(command: Any, layers: str) -> Task:
    """Read the pairs, load the model, resolve the hooks; what cannot be done is raised early."""
    method_of(command.method)
    vector: SteeringVector | None = None
    if getattr(command, "vector", None) is not None:
        if given := [f"--{name}" for name in command.given("method", "layers", "position")]:
            raise InputError(
                f"a --vector is measured as a whole, at its own hooks: leave out {', '.join(given)}"
            )
        vector = sl.export.gguf_file.read_vector(command.vector)
    fit_on, measure_on = command.read_pairs()
    position: Position
    if vector is not None:
        position = position_of(vector, None)
    else:
        check_pairs(fit_on, command.method)
        given = command.position
        position = default_position(command.method, fit_on) if given is None else as_position(given)
    model = command.load(command.model or DEFAULT_MODEL)
    hook_names = sl.resolve_hooks(model, layers) if vector is None else (joined_hooks(vector),)
    return Task(command, model, fit_on, measure_on, hook_names, position, vector)


@dataclass
class Run:
    """A run of a command into a folder, timed from its beginning to when it is written."""

    out: Path
    request: Mapping[str, Any]
    parts: Parts
    options: Mapping[str, Any]
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    spent: float | None = None

    def write(
        self,
        tables: Mapping[str, pd.DataFrame],
        directions: Directions | SteeringVector | Mapping[str, Directions],
        *,
        forward_equivalents: float | None = None,
        **more: Any,
    ) -> None:
        """As `write_run`, with time and warnings, those from before the run was stopped too."""
        self.seconds = time.perf_counter() - self.started + self.parts.seconds
        self.spent = forward_equivalents
        for text in self.parts.warned:
            keep_warning(text)
        try:
            write_run(
                self.out,
                tables,
                directions,
                self.request,
                seconds=self.seconds,
                forward_equivalents=forward_equivalents,
                warnings=warned(),
                options=self.options,
                **more,
            )
        except FileError as error:
            raise FileError(f"{error}; what was measured is kept: {self.parts.go_on}") from error

    def note(self, count: str) -> None:
        """Say how many of what were written, where, and what it took."""
        spent = "" if self.spent is None else f" ({self.spent:.0f} forward-equivalents)"
        note(f"{count} in {self.seconds:.0f} s{spent}; written to {self.out}")
