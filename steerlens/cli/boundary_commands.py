"""The commands that measure layers: `boundary` and `geometry`, and `layers` unsteered."""

from dataclasses import dataclass
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import ModelCommand, PairsCommand, TableCommand
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.options import OWN_TOKENS
from steerlens.cli.printing import print_boundary, print_layers, print_rows, say
from steerlens.models.packaged import DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True)
class Boundary(FolderCommand, PairsCommand):
    """How far each layer can be pushed before the budget is spent."""

    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int | None = None
    layers: str = "all"
    vector: str | None = None
    method: str = "mean_diff"
    position: str | None = None
    labels: str | None = None
    own_tokens: int = OWN_TOKENS
    on: str = "positive"
    budget: str = "relative=0.01"
    search_range: float = 4.0
    angles: int | None = None

    def measure(self) -> None:
        (text, texts), labels = opt.text_of(self.on), opt.labels_of(self)
        sl.measure.boundary.check_search(budget=self.budget, search_range=self.search_range)
        task = self.prepare(self.layers)
        if self.angles is not None and task.vector is not None:
            sl.measure.boundary.check_joint(task.vector, self.angles)
        elif self.angles is not None:
            sl.measure.plane.check_plane(task.hook_names, self.angles)
        with self.opened(task.request("boundary", texts=texts)) as run:
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, budget=self.budget, **labels)
                search: dict[str, Any] = {"on": text, "search_range": self.search_range}
                result = study.boundary(**search, with_projection=True)
                tables = {"boundary": result.curves, "layers": result.layers}
                if self.on == "positive":
                    tables["segments"] = study.segments(result)
                if self.angles is not None and task.vector is not None:
                    tables["joint"] = study.joint_boundary(n_angles=self.angles, **search)
                elif self.angles is not None:
                    plane = study.boundary_shape(self.layers, n_angles=self.angles, **search)
                    tables["shape"] = plane.table
            spent = sum(
                t.attrs["forward_equivalents"] for name, t in tables.items() if name != "boundary"
            )
            run.write(tables, study.directions, forward_equivalents=spent)
        print_boundary(result.layers)
        if "joint" in tables:
            print_rows(tables["joint"], "joint")
        elif self.angles is not None:
            ratio, if_round = plane.table[["radius_ratio", "radius_ratio_if_round"]].iloc[0]
            say(
                f"in the plane: largest boundary over smallest {ratio:.2f}; {if_round:.2f} if round"
            )
        n_boundaries = result.layers[["boundary_pos", "boundary_neg"]].notna().sum().sum()
        run.note(f"{n_boundaries} boundaries")


@dataclass(frozen=True, kw_only=True)
class Geometry(FolderCommand, PairsCommand):
    """Loss, gradients and boundary in the plane of the direction."""

    layers: str | None = None
    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int | None = None
    method: str = "mean_diff"
    position: str | None = None
    labels: str | None = None
    own_tokens: int = OWN_TOKENS
    angles: int = 16
    budget: str = "relative=0.01"

    def measure(self) -> None:
        labels = opt.labels_of(self)
        sl.measure.boundary.check_search(budget=self.budget)
        task = self.prepare(str(self.layers))
        with self.opened(task.request("geometry")) as run:
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, budget=self.budget, **labels)
                result = study.plane(n_angles=self.angles)
            tables = {
                "geometry": result.points,
                "contours": result.contours,
                "shape": result.shape,
            }
            spent = result.points.attrs["forward_equivalents"]
            run.write(tables, study.fitted, forward_equivalents=spent)
        print_rows(result.shape, "shape")
        run.note(f"{len(result.contours)} pushes")


@dataclass(frozen=True, kw_only=True)
class Layers(ModelCommand, TableCommand, PairsCommand):
    """The per-layer table of the unsteered model, without a sweep."""

    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int | None = None
    layers: str = "all"
    method: str = "mean_diff"
    position: str | None = None

    @property
    def next(self) -> str:
        return self.onward(Boundary, pairs=self.pairs, out="runs/boundary")

    def run(self) -> None:
        task = self.prepare(self.layers)
        with task.progress() as progress:
            table = task.study(progress).layers
        self.write(table)
        print_layers(table)
