"""`steerlens layers`: the per-layer table, without a sweep."""

from dataclasses import dataclass

from steerlens.cli import options as opt
from steerlens.cli.command import ModelCommand, PairsCommand, TableCommand, prepare
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

    def run(self) -> None:
        """What the command does."""
        task = prepare(self, self.layers)
        with task.progress() as progress:
            table = task.study(progress).layers
        self.write(table)
        if not self.quiet:
            print_layers(table)
