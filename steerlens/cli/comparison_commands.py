"""The commands that compare: `compare` and `reliability`."""

from dataclasses import dataclass
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import ModelCommand, PairsCommand, TableCommand
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.options import OWN_TOKENS
from steerlens.cli.printing import print_rows, print_summary, progress_of, say
from steerlens.cli.sweep_command import Sweep
from steerlens.errors import InputError
from steerlens.models.packaged import DEFAULT_MODEL

TEST_SHARE = 0.7
"""Of a file of items, the part that is held out; the layer is chosen on the rest."""


@dataclass(frozen=True, kw_only=True)
class Compare(FolderCommand, PairsCommand):
    """Methods at equal damage, on held-out items, among nulls."""

    model: str = DEFAULT_MODEL
    items: str | None = None
    layers: str | None = None
    methods: str = "mean_diff,pca,pca_pooled,lda,probe,gradient_mean,fisher_pullback"
    budget: str = "kl=0.1"
    on: str = "own"
    own_tokens: int = OWN_TOKENS
    null: int = 20
    max_items: int | None = None
    off_target: str = "all"
    position: str | None = None

    def measure(self) -> None:
        from steerlens.cli.task import request_of

        as_position = sl.engine.positions.as_position
        methods = [name.strip() for name in self.methods.split(",") if name.strip()]
        for name in methods:
            sl.directions.methods.method_of(name)
        sl.measure.boundary.check_search(budget=self.budget)
        fit_on, _ = self.read_pairs()
        how = {"columns": opt.columns_of(self.columns), "form": self.form, "group": self.group}
        if self.items is None:
            train_items, test_items = _items_of(self.pairs, self.seed, **how)
        else:
            train_items, test_items = _items_of(self.items, self.seed)
        if self.max_items is not None:
            test_items = test_items[: max(self.max_items, 0)]
        off_target = _others(self.off_target, (self.items, self.pairs))
        model = self.load(self.model)
        position = None if self.position is None else as_position(self.position)
        layers = self.layers or ",".join(str(model.cfg.n_layers * part // 4) for part in (1, 2, 3))
        data = {
            "fitted_on": opt.pairs_record(fit_on),
            "chosen_on": opt.items_record(train_items),
            "measured_on": opt.items_record(test_items),
            "off_target": {name: opt.items_record(items) for name, items in off_target.items()},
            "hook_names": sl.resolve_hooks(model, layers),
        }
        request = request_of("compare", self, model, data, methods=methods, position=position)
        with self.opened(request) as run:
            self.note_read(fit_on)
            with progress_of() as progress:
                result = sl.compare(
                    *(model, fit_on, test_items),
                    methods=methods,
                    layers=layers,
                    train_items=train_items,
                    off_target=off_target,
                    budget=self.budget,
                    on=self.on,
                    own_tokens=self.own_tokens,
                    n_null=self.null,
                    position=position,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    progress=progress,
                    checkpoint=run.parts,
                )
            tables = {
                "comparison": result.table,
                "summary": result.summary,
                "methods": result.methods,
                "effects": result.effects,
            }
            spent = result.table.attrs["forward_equivalents"]
            run.write(tables, result.directions, forward_equivalents=spent)
        print_rows(result.table, "comparison")
        if (result.table.spent_neg > 2).any():
            say("spent neg above 2: minus the coefficient does more than twice the budget's damage")
        print_summary(result.summary)
        if len(result.methods):
            print_rows(result.methods, "methods")
        run.note(f"{len(result.table)} rows")


@dataclass(frozen=True, kw_only=True)
class Reliability(ModelCommand, TableCommand, PairsCommand):
    """How far each direction can be trusted, before steering."""

    model: str = DEFAULT_MODEL
    layers: str = "all"
    position: str | None = None

    @property
    def next(self) -> str:
        return self.onward(Sweep, pairs=self.pairs, out="runs/sweep")

    def run(self) -> None:
        fit_on, _ = self.read_pairs()
        model = self.load(self.model)
        self.note_read(fit_on)
        with progress_of() as progress:
            differences = sl.collect_differences(
                *(model, fit_on),
                layers=self.layers,
                position=-1 if self.position is None else self.position,
                batch_size=self.batch_size,
                progress=progress,
            )
        table = sl.reliability(differences, seed=self.seed)
        self.write(table)
        print_rows(table, "reliability", table.n_pairs.iloc[0])


def _items_of(source: str, seed: int, **how: Any) -> tuple[Any, Any]:
    """Training and held-out items: a shipped dataset's parts, or those of a file."""
    if source in sl.data.dataset_names():
        train, test = (sl.PreferenceItems.load(source, split=split) for split in ("train", "test"))
        return train, test
    try:
        items = sl.PreferenceItems.load(source, **how)
    except InputError as error:
        raise InputError(
            f"{error}; a comparison needs items, which have prompt, positive and negative: give "
            "them with --items"
        ) from error
    return items.split(TEST_SHARE, seed)


def _others(names: str, measured: tuple[str | None, str]) -> dict[str, Any]:
    if names == "none":
        return {}
    chosen = sl.data.dataset_names() if names == "all" else [n.strip() for n in names.split(",")]
    return {
        name: sl.PreferenceItems.load(name, split="test") for name in chosen if name not in measured
    }
