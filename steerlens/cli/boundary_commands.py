"""The commands that measure layers: `boundary` and `geometry`, and `layers` unsteered."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

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

    model: opt.Model = DEFAULT_MODEL
    test_pairs: opt.TestPairs = None
    max_pairs: opt.MaxPairs = None
    layers: opt.Layers = "all"
    vector: opt.Vector = None
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    labels: opt.Labels = None
    own_tokens: opt.OwnTokens = OWN_TOKENS
    on: Annotated[str, "positive, negative, neutral (shipped text), or a text file."] = "positive"
    budget: Annotated[str, "relative=0.01, nats=0.05, kl=0.1, kl_p95=1 or rollout_kl_p95=1"] = (
        "relative=0.01"
    )
    search_range: Annotated[float, "How far to look, in mean residual norms of a layer."] = 4.0
    angles: Annotated[
        int | None,
        typer.Option(
            "--angles",
            "--shape",
            help="Boundaries at so many angles in a plane too: of one layer, or of the two hooks "
            "of a vector.",
        ),
    ] = None

    EXAMPLES = (
        "boundary --pairs sentiment --max-pairs 16 --out runs/boundary",
        "boundary --layers 15 --budget kl=0.1 --on neutral --out runs/kl",
    )

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
            columns = ["angle", "boundary", "boundary_ci_low", "boundary_ci_high"]
            columns += ["coefficient_a", "coefficient_b"]
            print_rows(tables["joint"], "Joint boundary of the two hooks", columns)
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

    layers: Annotated[str | None, f"As of `sweep`; minutes for each. {opt.NEEDED}"] = None
    model: opt.Model = DEFAULT_MODEL
    test_pairs: opt.TestPairs = None
    max_pairs: opt.MaxPairs = None
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    labels: opt.Labels = None
    own_tokens: opt.OwnTokens = OWN_TOKENS
    angles: Annotated[int, typer.Option(min=3, help="Angles of the plane to push along.")] = 16
    budget: Annotated[str, "As of `boundary`."] = "relative=0.01"

    NEEDED: ClassVar[tuple[str, ...]] = ("layers",)
    EXAMPLES = (
        "geometry --layers 15 --max-pairs 16 --out runs/geometry",
        "geometry --layers 5,10,15 --angles 24 --labels own --out runs/own",
    )

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
        columns = ["layer", "angle", "boundary", "boundary_ci_low", "boundary_ci_high"]
        print_rows(result.shape, "Boundary in the plane", columns)
        run.note(f"{len(result.contours)} pushes")


@dataclass(frozen=True, kw_only=True)
class Layers(ModelCommand, TableCommand, PairsCommand):
    """The per-layer table of the unsteered model, without a sweep."""

    model: opt.Model = DEFAULT_MODEL
    test_pairs: opt.TestPairs = None
    max_pairs: opt.MaxPairs = None
    layers: opt.Layers = "all"
    method: opt.Method = "mean_diff"
    position: opt.Position = None

    EXAMPLES = (
        "layers --pairs sentiment --max-pairs 16",
        "layers --pairs mine.csv --layers 10:20:2 --out layers.csv",
    )

    @property
    def next(self) -> str:
        return self.onward(Boundary, pairs=self.pairs, out="runs/boundary")

    def run(self) -> None:
        task = self.prepare(self.layers)
        with task.progress() as progress:
            table = task.study(progress).layers
        self.write(table)
        print_layers(table)
