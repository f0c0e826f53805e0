"""`steerlens layers`: the per-layer table, without a sweep."""

from dataclasses import dataclass

from steerlens.cli import options as opt
from steerlens.cli.boundary_commands import Boundary
from steerlens.cli.command import ModelCommand, PairsCommand, TableCommand
from steerlens.cli.printing import print_layers
from steerlens.models.packaged import DEFAULT_MODEL


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
        """What costs more and says more."""
        return self.onward(Boundary, pairs=self.pairs, out="runs/boundary")

    def run(self) -> None:
        """What the command does."""
        task = self.prepare(self.layers)
        with task.progress() as progress:
            table = task.study(progress).layers
        self.write(table)
        print_layers(table)
