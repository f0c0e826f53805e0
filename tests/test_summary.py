"""What a report says of each command's run in sentences, held against numbers by hand."""

import math
from pathlib import Path

import pandas as pd
import pytest
from run_folders import (
    WRITERS,
    circuits_tables,
    geometry_tables,
    sweep_table,
    write,
    write_sweep,
)

import steerlens as sl
from steerlens.runs.html_report.summary import summarise


def sentences(folder: Path) -> list[str]:
    return summarise(sl.read_run(folder))


def test_the_summary_of_a_sweep(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "run")
    said = sentences(folder)
    assert said[0] == (
        "Measured on 8 pairs of sentiment/test; the directions are fitted on others, 120 "
        "pairs of sentiment/train."
    )
    assert said[1] == "Unsteered, the labels' mean logprob is −2.5 nats per token."  # noqa: RUF001
    assert said[2] == (
        "Of 210 cells 150 are within the budget (relative=0.01); of 0 the interval of the "
        "degradation reaches across it, so they are undecided."
    )
    # gain 3 at layer 12, times c = -20; the readouts, with a gain of 5, do not count.
    assert "most at layer 12 with coefficient −20: by −60 residual units" in said[3]  # noqa: RUF001
    assert "degradation of +0.008 nats per token (95% interval +0.003 to +0.013)" in said[3]
    assert "no layer was chosen on one set and tested on another" in said[4]


def test_what_a_sweep_may_not_claim(tmp_path: Path) -> None:
    """In-sample numbers and overflow are called so; readouts alone show no layer."""
    cells = sweep_table()
    readouts = cells[cells.hook_name == cells.readout_hook].reset_index(drop=True)
    cells.loc[3, "logprob_nats"] = math.nan
    cells.loc[cells.coefficient == 20, "coherent"] = "undecided"
    said = sentences(write(tmp_path / "run", "sweep", {"sweep": cells}, n_pairs_fitted_on=3))
    assert "the directions are fitted on 3 of these too" in said[0]
    assert "in sample" in said[0]
    assert "Of 210 cells 120 are within the budget" in said[2]
    assert "of 30 the interval of the degradation reaches across it" in said[2]
    assert said[3] == "1 cells are undefined: the model overflowed there."
    said = sentences(write(tmp_path / "readouts", "sweep", {"sweep": readouts}))
    assert len(said) == 3
    assert not any("moves most" in sentence or "in sample" in sentence for sentence in said)


SUMMARIES = {
    "boundary": (
        "relative=0.01 on positive text",
        "The boundary for c > 0 is found at 29 of 30 hooks, beyond the searched range at 1.",
        # (5 + L) / (10 + 2 L) is a half everywhere; (6 + L) / (10 + 2 L) falls from 0.6 to 35 / 68.
        "smallest at layer 29 (0.515) and largest at layer 0 (0.6).",
        "The prediction from gradients at 0 held at 20 of 30 hooks.",
    ),
    "compare": (
        "Every method may do the same damage (kl=0.1 on own text)",
        "100 items of sentiment/test",
        "chosen on 40 other items (sentiment/train)",
        "largest effect is that of mean_diff at layer 10: +0.7 nats per token",
        "95% interval +0.5 to +0.9",
        "between −0.1 and +0.1",  # noqa: RUF001
        "Its rank is 1 of 2, with a 95% interval of 1 to 2.",
        'The verdict is "effect" for 1 of 2 methods.',
    ),
    "circuits": (
        "At coefficient 20 the vector moves the answer logit difference from −0.5 to 2.25",  # noqa: RUF001
        "largest writer of the direction is L3H5, with 0.15 of the projection",
        "mlp13: −1.75 logits by the estimate, −1.74 by exact",  # noqa: RUF001
        "attention values 0.12 (0.1 to 0.13).",
    ),
    "geometry": (  # 5 + 5 |cos|: 10 along the direction, 5 across it
        "In the plane of the direction, at layer 10 the boundary is found at 8 of 8 angles, from 5 "
        "to 10 residual units away.",
    ),
    "behave": (
        "Written after 1 prompt, 2 texts each at every coefficient",
        "At layer 5 with coefficient −8 the concept of the texts moves by",  # noqa: RUF001
    ),
}


@pytest.mark.parametrize("command", SUMMARIES)
def test_the_summary_of_another_command(command: str, tmp_path: Path) -> None:
    said = " ".join(sentences(WRITERS[command](tmp_path / "run")))
    for words in SUMMARIES[command]:
        assert words in said


def test_what_a_circuit_leaves_is_told_where_it_is_known(tmp_path: Path) -> None:
    """Of random components where some were drawn; never of nothing held, of which all is left."""
    tables = circuits_tables()
    claims = tables["claims"]
    assert claims.remaining[claims.test == "nothing"].tolist() == [1.0]
    (before,) = sentences(write(tmp_path / "none", "circuits", tables, coefficient=20.0))[-1:]
    claims.loc[claims.test == "random components", ["remaining", "ci_low", "ci_high"]] = 0.9, 0.8, 1
    (after,) = sentences(write(tmp_path / "some", "circuits", tables, coefficient=20.0))[-1:]
    assert after == before.replace(").", "); random components 0.9 (0.8 to 1).")
    assert "nothing" not in after


def test_hooks_of_one_layer_have_a_sentence_each(tmp_path: Path) -> None:
    tables = geometry_tables()
    shape = tables["shape"]
    other = shape.assign(hook_name="blocks.10.hook_mlp_out", boundary=math.inf)
    tables["shape"] = pd.concat([shape, other], ignore_index=True)
    tables["shape"].attrs.update(shape.attrs)
    said = sentences(write(tmp_path / "run", "geometry", tables))[-2:]
    assert "at layer 10 the boundary is found at 8 of 8 angles" in said[0]
    assert "at layer blocks.10.hook_mlp_out the boundary is found at 0 of 8 angles" in said[1]
