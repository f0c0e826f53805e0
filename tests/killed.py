"""`python killed.py SIGNAL SEED KILLS LOG WHOLE OUT COMMAND...`: a run stopped at random moments.

Every try is a child of its own, so that the signal is a real one and the imports are paid for once.
The first is `steerlens COMMAND` into WHOLE, undisturbed; the second into OUT-1, and the others
`steerlens COMMAND[0] --resume` of it. KILLS of them get a signal, at random among all calls of what
is counted; where a run ends before, another is begun in OUT-2 and so on. LOG gets a line for each
run, try and part.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformer_lens.model_bridge  # noqa: F401 (else each child would)
import transformers.models.llama.modeling_llama  # noqa: F401
from commands import NEUTRAL

from steerlens import cli
from steerlens.circuits.tasks import Task
from steerlens.measure import texts
from steerlens.runs import unfinished

_, NAME, SEED, KILLS, LOG, WHOLE, OUT, *ARGUMENTS = sys.argv
SIGNAL = signal.Signals[NAME]
moments = random.Random(int(SEED))


def note(text: str) -> None:
    with Path(LOG).open("a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def strike_at(moment: int) -> Callable[[], int]:
    """Send the signal to this process before the call of that number, of any of these functions.

    What is returned gives how many calls there were.
    """
    left = moment

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), SIGNAL)
            return function(*args, **options)

        return call

    kept = unfinished.Parts.keep

    def keep(parts: unfinished.Parts, name: str, *part: Any) -> None:
        note(f"ran {name}")
        kept(parts, name, *part)
        note(f"kept {name}")

    unfinished.Parts.keep = counted(keep)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
    for module, name in (("measure.sweeps", "measure"), ("engine.cells", "start_cells")):
        measured = sys.modules[f"steerlens.{module}"]
        setattr(measured, name, counted(getattr(measured, name)))
    Task.measure = counted(Task.measure)
    return lambda: moment - left


def tried(moment: int, out: str) -> int:
    """How a try ended that gets the signal at that call, if any; its calls stand in LOG."""
    marks = ["/parts/_request.json", "/run.json"]
    if ARGUMENTS[0] == "extract":
        out, marks = f"{out}/v.safetensors", [".unfinished/parts/_request.json", ""]
    is_begun = any(Path(out + mark).exists() for mark in marks)
    words = ["--resume", out] if is_begun else [*ARGUMENTS[1:], "--out", out]
    child = os.fork()
    if child == 0:
        n_calls = strike_at(moment)
        try:
            cli.main([ARGUMENTS[0], "--quiet", *words])
        finally:
            note(f"calls {n_calls()}")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    note(f"ended {code}")
    return code


texts.neutral_texts = lambda: NEUTRAL
signal.signal(signal.SIGINT, signal.default_int_handler)
assert tried(0, WHOLE) == 0
calls = Path(LOG).read_text(encoding="utf-8").rpartition("calls ")[2]
n_calls, killed, begun = int(calls.split()[0]), 0, 1
Path(LOG).write_text("begun\n", encoding="utf-8")
while True:
    moment = moments.randint(1, n_calls) if killed < int(KILLS) else 0
    code = tried(moment, f"{OUT}-{begun}")
    if code == 0 and killed == int(KILLS):
        sys.exit()
    if code == 0:  # before it was its turn: another run is to be killed
        begun += 1
        note("begun")
    elif code in (-SIGNAL, 130):
        killed += 1
    else:
        sys.exit(f"a try ended with {code}")
