"""`steerlens read`: what a vector says, in tokens and on texts, and what it is near to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steerlens as sl
from steerlens.cli.command import LoadCommand, TableCommand
from steerlens.cli.printing import note, print_rows, print_table, progress_of, short
from steerlens.cli.vector_commands import (
    PROMPT,
    Generate,
    load_with_model,
    named_vectors,
)
from steerlens.errors import InputError
from steerlens.files import write_out


@dataclass(frozen=True, kw_only=True)
class Read(TableCommand, LoadCommand):
    """What a vector says: tokens that it promotes, texts it reads.

    Beside each first token stands that of random directions: a vector may steer and say nothing.
    """

    vector: Path
    model: str | None = None
    jacobian: str | None = None
    texts: Path | None = None
    beside: list[Path] | None = None
    tokens: int = 8
    page: Path | None = None

    @property
    def next(self) -> str:
        return self.onward(Generate, prompt=PROMPT)

    def run(self) -> None:
        if self.page is not None and self.page.suffix != ".html":
            raise InputError(f"--page {str(self.page)!r}: expected a name that ends in .html")
        texts = None if self.texts is None else sl.data.reading.read_texts(self.texts)
        others = named_vectors([self.vector, *(self.beside or [])])
        vector, model = load_with_model(self.vector, self.model, self.load)
        words = sl.measure.lenses.vocabulary(
            model, vector, jacobian=self.jacobian, n_tokens=self.tokens
        )
        read = None
        if texts is not None:
            with progress_of() as progress:
                read = sl.measure.lenses.readings(model, vector, texts, progress=progress)
        _print_words(words)
        if read is not None:
            _print_readings(read, texts)
        if self.beside:
            _print_nearest(sl.cosine_table(others), next(iter(others)))
        self.write(words)
        if self.page is not None:
            from steerlens.plots.pages import reading_page

            page = reading_page(words, read).html.encode()
            write_out(self.page, lambda path: path.write_bytes(page))
            note(f"written to {self.page}")


def _print_words(words: Any) -> None:
    n_random = words.attrs["settings"]["n_random"]
    rows = []
    for (hook, lens, side), of_side in words.groupby(["hook_name", "lens", "side"], sort=False):
        first = of_side.iloc[0][["logit", "random_logit", "p_value", "p_layers"]]
        labels = [sl.tables.hook_label(str(hook)), str(lens), str(side)]
        rows.append([*labels, " ".join(of_side.raw_token), *map(short, map(float, first))])
    print_table(
        f"Tokens that the direction alone promotes, its first one against {n_random} random ones",
        ["hook", "lens", "side", "tokens", "logit", "random", "p", "p, all hooks"],
        rows,
        left=("hook", "lens", "side", "tokens"),
    )


def _print_readings(read: Any, texts: Any) -> None:
    firsts = read.groupby(["hook_name", "side", "rank"], sort=False).first().reset_index()
    rows = [
        [sl.tables.hook_label(row["hook_name"]), row["side"], short(row["mean_projection"])]
        + [texts[int(row["prompt"]) - 1]]
        for row in firsts.to_dict("records")
    ]
    names = ["hook", "side", "mean projection", "text"]
    print_table("Texts on which it reads highest and lowest", names, rows, left=("side", "text"))


def _print_nearest(table: Any, name: str) -> None:
    """Cosines of a vector with others, the largest first of either sign."""
    beside = table[(table.vector_a == name) & (table.vector_b != name)]
    order = beside.cosine.abs().sort_values(ascending=False, kind="stable").index
    print_rows(beside.loc[order], "nearest", name)
