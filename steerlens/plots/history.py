"""How a vector was trained: what it did to the pairs' differences, step by step."""

from itertools import cycle

import pandas as pd

from steerlens.plots import style as vl
from steerlens.plots.checks import by_hook, checked_table
from steerlens.plots.figure import Figure, make_figure

_SHOWN = (
    ("separation", "Separation: the norm", vl.RESIDUAL),
    ("projection", "Projection on the axis", vl.RESIDUAL),
    ("angle_deg", "Angle to the axis", "degrees"),
    ("degradation_nats", "Degradation", vl.NATS),
)


def training(history: pd.DataFrame) -> Figure:
    """Norm, projection, angle and degradation along training, a curve a method.

    Takes the `history` of `train_directions`, or several joined by `pd.concat`; one frame a hook.
    Lines are the held-out examples, dots the examples of each step. Raises `InputError` when the
    table is not such a history.

    Examples:
        >>> schedule = sl.directions.Schedule(max_epochs=2)
        >>> trained = sl.directions.train_directions(model, pairs, layers=[1], schedule=schedule)
        >>> sl.plots.training(trained.history)
        Figure('Training', 4 panels)
    """
    columns = ["method", "part", "step", *(name for name, *_ in _SHOWN)]
    checked_table(history, ["hook_name", *columns], "the history of train_directions")
    rows = pd.concat(of_hook.assign(frame=label) for label, of_hook in by_hook(history).items())
    colours = vl.named(
        "method", dict(zip(rows.method.unique(), cycle((vl.BLUE, vl.ORANGE, vl.GREEN, vl.GREY))))
    )
    panels = []
    for name, title, unit in _SHOWN:
        axes = {
            "x": vl.number("step", "step", axis={"tickMinStep": 1, "format": "d"}),
            "y": vl.number(name, unit, scale={"zero": False}),
            "color": colours,
            "tooltip": vl.tooltip("method", "part", numbers=["step", name]),
        }
        dots = {"filled": True, "size": 14, "opacity": 0.4}
        marks = [
            vl.layer("steps", "point", axes, where="datum.part === 'train'", **dots),
            vl.layer("steps", "line", axes, where="datum.part === 'held_out'", point={"size": 20}),
        ]
        panels.append(vl.panel(marks, title=title, size=(380, 220), zoom=f"zoom_{name}"))
    caption = (
        "Under +v on the positive and -v on the negative prompts, at the readout hook: mean length "
        "of the pairs' differences, their mean projection on the frozen axis (residual units), "
        "their mean angle to it (degrees), and the loss of logprob of the positive prompts' labels "
        "(nats per token; positive is worse), after so many steps of training. Lines are the "
        "held-out examples, dots those of each step."
    )
    tables = {"steps": rows[["frame", *columns]]}
    return make_figure(
        "Training", caption, tables, panels, columns=2, slider="hook:", is_one_legend=True
    )
