"""`python killed.py SIGNAL SEED LOG ARGUMENTS...`: a sweep that gets the signal at random moments.

Every try is a child of its own, so that the signal is a real one and the imports are paid for once.
The first is `steerlens sweep ARGUMENTS`, the others `steerlens sweep --resume` of its folder. LOG
gets a line for each try and each hook of it.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerlens import cli
from steerlens.runs import unfinished

TRIES = 40
_, NAME, SEED, LOG, *ARGUMENTS = sys.argv
SIGNAL = signal.Signals[NAME]
OUT = ARGUMENTS[ARGUMENTS.index("--out") + 1]
moments = random.Random(int(SEED))


def note(text: str) -> None:
    with Path(LOG).open("a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def strike_at(moment: int) -> None:
    """Send the signal to this process before the call of that number, of any of these functions."""
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

    def keep(parts: unfinished.Parts, hook: Any) -> None:
        note(f"ran {hook.hook_name}")
        kept(parts, hook)
        note(f"kept {hook.hook_name}")

    unfinished.Parts.keep = counted(keep)
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
    module = sys.modules["steerlens.measure.sweeps"]
    module.measure = counted(module.measure)


signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(TRIES):
    is_begun = any((Path(OUT) / name).exists() for name in ("parts/_request.json", "run.json"))
    moment = moments.randint(1, 90)
    child = os.fork()
    if child == 0:
        strike_at(moment)
        cli.main(["sweep", "--quiet", *(["--resume", OUT] if is_begun else ARGUMENTS)])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    note(f"ended {code}")
    if code == 0:
        sys.exit()
    if code not in (-SIGNAL, 130):
        sys.exit(f"a try ended with {code}")
sys.exit(f"not finished after {TRIES} tries")
