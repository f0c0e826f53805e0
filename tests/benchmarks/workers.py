"""Contenders as processes of their own environments, of which one at a time is asked for work."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from prepare import HERE, environment

US = "steerlens"
NAMES = {
    US: "steerlens `sweep`",
    "hf": "Hugging Face forward hooks",
    "hf_lean": "the same by hand, logits at the labels only",
    "hf_cache": "by hand, and the prompt's keys and values kept",
    "bridge": "`TransformerBridge.run_with_hooks`",
    "steering_vectors": "steering-vectors",
    "repeng": "repeng",
    "nnsight": "nnsight",
}
OWN_ENVIRONMENT = ("repeng", "nnsight")
PAUSE = 0.5  # seconds before a command, for another worker's threads to go to sleep


class Worker:
    """A `peer_*.py` that waits on stdin until it is asked for something."""

    def __init__(self, name: str, python: str, work: Path, *, threads: int, log: Path) -> None:
        self.name = name
        self.log = log
        # The variable is for numpy; torch is told on the command line.
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [python, str(HERE / f"peer_{name}.py"), str(work), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self.versions: dict[str, str] = self._answer()["versions"]

    def ask(self, op: str, **options: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a worker that has died is told of by `_answer`
            self.process.stdin.write(json.dumps({"op": op, **options}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def quit(self) -> None:
        """Let it end; one that hangs is ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write('{"op": "quit"}\n')
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8")[-2000:]
            raise SystemExit(f"{self.name} ended without an answer; the end of its log:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def pythons(out: Path, names: list[str]) -> dict[str, str]:
    """The Python of every contender, its environment made where it is missing."""
    return {
        name: environment(out, name) if name in OWN_ENVIRONMENT else sys.executable
        for name in names
    }


@contextmanager
def running(
    interpreters: Mapping[str, str], work: Path, *, threads: int
) -> Iterator[dict[str, Worker]]:
    """The contenders, loaded one after another; all of them end with the block."""
    logs = work.parent / "logs"
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        workers = {}
        for name, python in interpreters.items():
            workers[name] = Worker(name, python, work, threads=threads, log=logs / f"{name}.log")
            stack.callback(workers[name].quit)
        yield workers
