"""The commands that measure how far a direction goes: `boundary` and `geometry`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from steerlens.cli import options as opt
from steerlens.cli.command import PairsCommand, prepare
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.printing import print_boundary, print_rows, say
from steerlens.data.reading import read_texts
from steerlens.engine.labels import OWN_TOKENS
from steerlens.measure.boundary import check_search
from steerlens.measure.joint import check_joint
from steerlens.measure.plane import check_plane
from steerlens.models.packaged import DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True)
class Boundary(FolderCommand, PairsCommand):
    """The first coefficient of each sign beyond which the budget is exceeded, at every layer."""

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
    shape: Annotated[
        int | None,
        "Boundaries at so many angles in a plane: of one layer, or of the two hooks of a vector.",
    ] = None

    def measure(self) -> None:
        """What the command does."""
        text, labels = opt.text_of(self.on), opt.labels_of(self)
        check_search(budget=self.budget, search_range=self.search_range)
        task = prepare(self, self.layers)
        if self.shape is not None and task.vector is not None:
            check_joint(task.vector, self.shape)
        elif self.shape is not None:
            check_plane(task.hook_names, self.shape)
        texts = list(read_texts(text)) if isinstance(text, Path) else None
        with self.opened(task.request("boundary", texts=texts)) as run:
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, budget=self.budget, **labels)
                search: dict[str, Any] = {"on": text, "search_range": self.search_range}
                result = study.boundary(**search, with_projection=True)
                tables = {"boundary": result.curves, "layers": result.layers}
                if self.on == "positive":
                    tables["segments"] = study.segments(result)
                if self.shape is not None and task.vector is not None:
                    tables["joint"] = study.joint_boundary(n_angles=self.shape, **search)
                elif self.shape is not None:
                    plane = study.boundary_shape(self.layers, n_angles=self.shape, **search)
                    tables["shape"] = plane.table
            spent = sum(
                t.attrs["forward_equivalents"] for name, t in tables.items() if name != "boundary"
            )
            run.write(tables, study.directions, forward_equivalents=spent)
        if self.quiet:
            return
        print_boundary(result.layers)
        if "joint" in tables:
            columns = ["angle", "boundary", "boundary_ci_low", "boundary_ci_high"]
            columns += ["coefficient_a", "coefficient_b"]
            print_rows(tables["joint"], "Joint boundary of the two hooks", columns)
        elif self.shape is not None:
            ratio, if_round = plane.table[["radius_ratio", "radius_ratio_if_round"]].iloc[0]
            say(
                f"in the plane: largest boundary over smallest {ratio:.2f}; {if_round:.2f} if round"
            )
        n_boundaries = result.layers[["boundary_pos", "boundary_neg"]].notna().sum().sum()
        run.note(f"{n_boundaries} boundaries")


@dataclass(frozen=True, kw_only=True)
class Geometry(FolderCommand, PairsCommand):
    """The loss, its gradients and the boundary in the plane of the direction, at some layers."""

    layers: Annotated[str | None, "As of `sweep`; minutes for each. Needed."] = None
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

    def measure(self) -> None:
        """What the command does."""
        labels = opt.labels_of(self)
        check_search(budget=self.budget, search_range=4.0)
        task = prepare(self, str(self.layers))
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
        if self.quiet:
            return
        columns = ["layer", "angle", "boundary", "boundary_ci_low", "boundary_ci_high"]
        print_rows(result.shape, "Boundary in the plane", columns)
        run.note(f"{len(result.contours)} pushes")
