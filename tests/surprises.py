"""What a call may not change, open or ask for: snapshots of the state, and a watch on a process."""

import hashlib
import logging
import os
import pickle
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import torch
from transformers.utils import logging as hf_logging

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)
TOKENIZER_SETTINGS = ("padding_side", "truncation_side", "pad_token", "eos_token", "bos_token")


def snapshot(model: Any) -> dict[str, Any]:
    """The state of the process, of a model and of its tokenizer, by name, as plain values."""
    wrapped, tokenizer = model.original_model, model.tokenizer
    modules = {f"a.{n}": m for n, m in model.named_modules()}
    modules |= {f"b.{n}": m for n, m in wrapped.named_modules()}
    weights = {**dict(wrapped.named_parameters()), **dict(wrapped.named_buffers())}
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "grad mode": torch.is_grad_enabled(),
        "torch rng": _digest(torch.get_rng_state().numpy().tobytes()),
        "numpy rng": _digest(pickle.dumps(np.random.get_state())),
        "python rng": hash(random.getstate()),
        "numpy errors": np.geterr(),
        "print options": (np.get_printoptions(), str(torch._tensor_str.PRINT_OPTS)),
        "pandas options": (pd.options.display.max_rows, pd.options.mode.chained_assignment),
        "warnings": [*map(str, warnings.filters)],
        "logging": (logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
        "transformers": (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()),
        "altair": (alt.theme.active, alt.theme.options, alt.data_transformers.active),
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "sys.path": list(sys.path),
        "streams": (id(sys.stdout), id(sys.stderr), id(sys.excepthook)),
        "signals": str(signal.getsignal(signal.SIGINT)),
        "modes": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in wrapped.named_parameters()},
        "grads": [name for name, p in wrapped.named_parameters() if p.grad is not None],
        "weights": {n: _digest(_bytes(w)) for n, w in weights.items()},
        "hooks": _hooks(model, modules),
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        "config": (repr(vars(model.cfg)), repr(wrapped.config)),
        "tokenizer": {name: getattr(tokenizer, name) for name in TOKENIZER_SETTINGS},
        "vocabulary": (len(tokenizer), str(tokenizer.chat_template)),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    return [name for name, value in before.items() if after[name] != value]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(weight: torch.Tensor) -> bytes:
    return weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hooks(model: Any, modules: dict[str, Any]) -> dict[str, int]:
    counts = {
        f"{name}.{kind}": len(getattr(module, kind, None) or ())
        for name, module in modules.items()
        for kind in HOOK_DICTS
    }
    for name, point in model.hook_dict.items():
        counts[name] = len(point.fwd_hooks) + len(point.bwd_hooks)
    return counts


# A state that nobody has by default


@contextmanager
def unusual(model: Any) -> Iterator[None]:
    """Training mode but for one part, half the weights frozen, no gradients, odd settings."""
    wrapped, tokenizer = model.original_model, model.tokenizer
    weights = list(wrapped.parameters())
    side = tokenizer.padding_side
    model.train()
    wrapped.train()
    model.blocks[0].eval()
    for weight in weights[::2]:
        weight.requires_grad_(False)
    tokenizer.padding_side = "left" if side == "right" else "right"
    try:
        with torch.no_grad(), np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a filter of the caller's")
            yield
    finally:
        tokenizer.padding_side = side
        for weight in weights[::2]:
            weight.requires_grad_(True)
        model.eval()
        wrapped.eval()


# Breaking off in the middle


class Interrupted(BaseException):
    """As Ctrl-C: no `except Exception` sees it."""


class Broken(Exception):  # noqa: N818 (a signal for the tests)
    """Something inside the forward pass fails."""


@contextmanager
def counting(model: Any, stop_at: int | None = None, kind: type[BaseException] = Broken) -> Any:
    """Count the calls of the model's parts in `calls[0]`; raise `kind` in call `stop_at`."""
    parts = {id(m) for m in (*model.modules(), *model.original_model.modules())}
    # The model that texts are written with is another one, of the same weights.
    weights = {weight.data_ptr() for weight in model.parameters()}
    calls = [0]

    def pre_hook(module: Any, args: Any) -> None:
        if id(module) in parts or any(w.data_ptr() in weights for w in module.parameters()):
            calls[0] += 1
            if calls[0] == stop_at:
                raise kind(f"at call {stop_at}")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(pre_hook)
    try:
        yield calls
    finally:
        handle.remove()


# A watch on files, network and pickles

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname")
# What another process does is not seen, so none may be started.
PROCESSES = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork")
REFUSED = (*NETWORK, *PROCESSES, "pickle.find_class")
# Event -> the places in its arguments of the paths that are written.
WRITING = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.utime": (0,),
    "shutil.move": (0, 1),
    "shutil.copyfile": (1,),
    "shutil.rmtree": (0,),
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_listeners: list[Callable[[str, Any], None]] = []
_is_installed: list[bool] = []


def _hear(event: str, args: Any) -> None:
    for listener in _listeners:
        listener(event, args)


def _written(event: str, args: Any) -> list[str]:
    if event == "open":
        path, _, flags = args
        is_writing = isinstance(flags, int) and flags & _WRITE_FLAGS
        paths = [path] if is_writing and not isinstance(path, int) else []
    else:
        paths = [args[i] for i in WRITING.get(event, ())]
        if event in ("os.remove", "os.rmdir") and isinstance(args[1], int) and args[1] >= 0:
            # Named within an open folder, as shutil.rmtree does.
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(args[0]))]
    return [os.path.abspath(os.fsdecode(path)) for path in paths if not isinstance(path, int)]


@contextmanager
def watched(*folders: Path) -> Iterator[list[str]]:
    """Refuse network, pickles and processes; give what was asked for and written elsewhere.

    `folders` are those in which writing is as it should be.
    """
    found: list[str] = []
    inside = [os.path.realpath(folder) for folder in folders]

    def listen(event: str, args: Any) -> None:
        if event in REFUSED:
            found.append(f"{event} {args[-2:]}")
            raise PermissionError(f"refused: {event}")
        for path in _written(event, args):
            real = os.path.realpath(path)
            if not any(real == f or real.startswith(f + os.sep) for f in inside):
                found.append(f"{event} {path}")

    if not _is_installed:  # a hook cannot be taken away again
        sys.addaudithook(_hear)
        _is_installed.append(True)
    _listeners.append(listen)
    loaders = {(of, name): getattr(of, name) for of, name in LOADERS}
    for of, name in loaders:
        setattr(of, name, _refusing(f"{of.__name__}.{name}", found))
    try:
        yield found
    finally:
        _listeners.remove(listen)
        for (of, name), loader in loaders.items():
            setattr(of, name, loader)


LOADERS = ((pickle, "load"), (pickle, "loads"), (torch, "load"))


def _refusing(name: str, found: list[str]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        found.append(name)
        raise PermissionError(f"refused: {name}")

    return refuse
