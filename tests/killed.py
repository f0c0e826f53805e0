"""`python killed.py CASES`: runs that are killed at random moments.

CASES is a JSON list of cases `[SEED, KILLS, LOG, WHOLE, OUT, COMMAND...]`; the exit code of each
is printed. Every case, and every try of it, is a child of its own, so that the signal is a
real one and the imports are paid for once. The first try is `steerlens COMMAND` into WHOLE,
undisturbed; the second into OUT-1, and the others `steerlens COMMAND[0] --resume` of it. KILLS of
them get a SIGKILL, at random among all calls of what is counted; where a run ends before, another
is begun in OUT-2 and so on. LOG gets a line for each run, try and part, and LOG.err what was said
on stderr.
"""

import json
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


def note(log: str, text: str) -> None:
    with Path(log).open("a", encoding="utf-8") as lines:
        lines.write(f"{text}\n")


def strike_at(moment: int, log: str) -> Callable[[], int]:
    """Kill this process before the call of that number, of any of these functions.

    What is returned gives how many calls there were.
    """
    left = moment

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    kept = unfinished.Parts.keep

    def keep(parts: unfinished.Parts, name: str, *part: Any) -> None:
        note(log, f"ran {name}")
        kept(parts, name, *part)
        note(log, f"kept {name}")

    unfinished.Parts.keep = counted(keep)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
    for module, name in (("measure.sweeps", "measure"), ("engine.cells", "start_cells")):
        measured = sys.modules[f"steerlens.{module}"]
        setattr(measured, name, counted(getattr(measured, name)))
    Task.measure = counted(Task.measure)
    return lambda: moment - left


def tried(moment: int, log: str, out: str, arguments: list[str]) -> int:
    """How a try ended that is killed at that call, if any; its calls stand in the log."""
    marks = ["/parts/_request.json", "/run.json"]
    if arguments[0] == "extract":
        out, marks = f"{out}/v.safetensors", [".unfinished/parts/_request.json", ""]
    is_begun = any(Path(out + mark).exists() for mark in marks)
    words = ["--resume", out] if is_begun else [*arguments[1:], "--out", out]
    child = os.fork()
    if child == 0:
        n_calls = strike_at(moment, log)
        try:
            cli.main([arguments[0], "--quiet", *words])
        finally:
            note(log, f"calls {n_calls()}")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    note(log, f"ended {code}")
    return code


def stop_often(seed: str, kills: str, log: str, whole: str, out: str, *arguments: str) -> None:
    """A case, in a process of its own."""
    os.dup2(os.open(f"{log}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    moments = random.Random(int(seed))
    assert tried(0, log, whole, [*arguments]) == 0
    calls = Path(log).read_text(encoding="utf-8").rpartition("calls ")[2]
    n_calls, killed, begun = int(calls.split()[0]), 0, 1
    Path(log).write_text("begun\n", encoding="utf-8")
    while True:
        moment = moments.randint(1, n_calls) if killed < int(kills) else 0
        code = tried(moment, log, f"{out}-{begun}", [*arguments])
        if code == 0 and killed == int(kills):
            sys.exit()
        if code == 0:  # before it was its turn: another run is to be killed
            begun += 1
            note(log, "begun")
        elif code == -signal.SIGKILL:
            killed += 1
        else:
            sys.exit(f"a try ended with {code}")


texts.neutral_texts = lambda: NEUTRAL
codes = []
for case in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        stop_often(*case)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
