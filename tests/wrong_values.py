"""Give every parameter of every public function what its annotation excludes; print what happens.

A program of its own, as the tests check types while they run and users do not.
"""

import inspect
import json
import sys
import tempfile
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from beartype.door import is_bearable
from jaxtyping import jaxtyped
from test_any_input import ELSEWHERE, arguments_of, functions, made_base

import steerlens as sl

WRONG = {
    "None": None,
    "an object": object(),
    "text": "no such thing",
    "1.5": 1.5,
    "nan": float("nan"),
    "complex": 1j,
    "-1": -1,
    "True": True,
    "a list of texts": ["a", "b"],
    "an array": np.ones((2, 2)),
    "a module": torch.nn.Linear(2, 2),
}


def is_excluded(value: Any, hint: Any) -> bool:
    """Whether the annotation does not allow it; no flag or NaN is a number."""
    if isinstance(value, bool) or (isinstance(value, float) and value != value):
        return "bool" not in str(hint) and "Any" not in str(hint)
    with jaxtyped("context"):
        return not is_bearable(value, hint)


def main() -> None:
    warnings.simplefilter("ignore")
    base = made_base(Path(tempfile.mkdtemp()))
    happened: dict[str, str] = {}
    for name, function in functions().items():
        if name in ELSEWHERE:
            continue
        hints = get_type_hints(inspect.unwrap(function))
        if "settings" in inspect.signature(function).parameters:
            hints |= get_type_hints(inspect.unwrap(sl.Study.__init__))
        arguments = arguments_of(name, base)
        for parameter in arguments:
            for told, value in WRONG.items():
                if parameter not in hints or not is_excluded(value, hints[parameter]):
                    continue
                try:
                    done = function(**arguments | {parameter: value})
                    if isinstance(done, AbstractContextManager):
                        with done:
                            pass
                    outcome = "no error"
                except sl.SteerlensError as error:
                    outcome = f"SteerlensError: {error}"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
                happened[f"{name}({parameter}={told})"] = outcome
    json.dump(happened, sys.stdout)


if __name__ == "__main__":
    main()
