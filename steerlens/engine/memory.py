"""Memory: what a pass takes beside the weights, what is free, smaller passes where it is out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from steerlens.engine.batches import Batch
from steerlens.errors import MemoryLimitError
from steerlens.models.hooked_model import HookedModel, weight_module

LOGITS_PER_PASS = 2**23
"""Logits that exist at once: 32 MiB of float32, and a few times that while they are reduced."""

_GIB = 2**30
_TEXTS = (
    "can't allocate memory",  # torch on the CPU
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA's own calls; MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
)

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, in torch, numpy or Python.

    Examples:
        >>> from steerlens.engine.memory import is_out_of_memory
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def warn_of_memory(size: int) -> None:
    """Say that passes go on with `size` prompts."""
    warnings.warn(
        f"out of memory: going on with {size} prompts a pass", RuntimeWarning, stacklevel=3
    )


def in_slices(n: int, size: int, run: Callable[[slice], T]) -> list[T]:
    """`run` of one slice after another of `n` rows, `size` at a time.

    Out of memory halves the size from there on, with a warning; of one row it is raised.
    """
    found: list[T] = []
    done = 0
    while done < n:
        part = slice(done, min(done + size, n))
        try:
            found.append(run(part))
        except (RuntimeError, MemoryError) as error:
            if part.stop - part.start == 1 or not is_out_of_memory(error):
                raise
        else:
            done = part.stop
            continue
        # Outside the block above, whose traceback would keep what did not fit.
        size = (part.stop - part.start) // 2
        warn_of_memory(size)
    return found


def pass_bytes(
    cfg: Any,
    *,
    rows: int,
    width: int,
    label_rows: int,
    dtype: torch.dtype,
    with_gradients: bool = False,
) -> int:
    """Bytes that a pass of `rows` prompts of `width` tokens takes beside the weights, at its peak.

    From the model's config alone: d_model, n_heads, n_layers, d_mlp and d_vocab. `label_rows` is
    the number of labels that are predicted. Without gradients it is the larger of one block (three
    matrices of attention scores, two residuals) and the output (the logits of all tokens, and those
    of the labels in `dtype` and in float32). With gradients, that of pairs of prompts: what every
    block keeps for the backward pass on both sides, and the logits of some labels. A lower bound:
    it counts what cannot be done without. Measured peaks are one to three times as high.

    Examples:
        >>> from steerlens.engine.memory import pass_bytes
        >>> size = {"rows": 2, "width": 10, "label_rows": 18, "dtype": torch.float32}
        >>> pass_bytes(model.cfg, **size)  # 20 rows of 160 logits, and 18 twice: 4 bytes each
        35840
    """
    item, tokens = dtype.itemsize, rows * width
    scores = item * rows * int(cfg.n_heads) * width**2
    states = item * tokens * int(cfg.d_model)
    logit_row = int(cfg.d_vocab)
    if not with_gradients:
        logits = logit_row * (item * tokens + (item + 4) * label_rows)
        return max(3 * scores + 2 * states, logits)
    hidden = item * tokens * int(getattr(cfg, "d_mlp", None) or 0)
    blocks = 2 * int(cfg.n_layers) * (scores + 2 * states + 2 * hidden)
    at_once = min(label_rows, max(1, LOGITS_PER_PASS // logit_row))
    return blocks + 3 * 4 * at_once * logit_row


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where that is not known.

    On the CPU what is available to this process: of the machine, and of its control group (a
    container, a batch job). On CUDA what torch holds without using it counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        import psutil

        return min([int(psutil.virtual_memory().available), *_control_groups(Path("/"))])
    return None


def check_memory(
    model: HookedModel, batches: Sequence[Batch], *, with_gradients: bool = False
) -> None:
    """See that the largest of the batches, as `pass_bytes` estimates it, fits beside the weights.

    Warns where it does not, with the number of prompts that would. Raises `MemoryLimitError` where
    one prompt alone does not. A model on several devices, and a device whose free memory is not
    known, are not checked.
    """
    device = _device(model)
    free = None if device is None else free_bytes(device)
    if free is None:
        return

    def needed(batch: Batch, rows: int) -> int:
        labels = int(batch.labels_on_cpu().sum())
        return pass_bytes(
            model.cfg,
            rows=rows,
            width=batch.tokens.shape[1],
            label_rows=labels * rows // len(batch.rows),
            dtype=model.cfg.dtype,
            with_gradients=with_gradients,
        )

    for batch in sorted(batches, key=lambda b: needed(b, len(b.rows)), reverse=True):
        asked = rows = len(batch.rows)
        while rows > 1 and needed(batch, rows) > free:
            rows //= 2
        has = f"{device} has {free / _GIB:.2f} GiB free"
        if needed(batch, rows) > free:
            raise MemoryLimitError(
                f"one prompt of {batch.tokens.shape[1]} tokens takes at least "
                f"{needed(batch, rows) / _GIB:.2f} GiB beside the weights, and {has}; leave out "
                "the longest prompts, load the model in dtype=torch.bfloat16, or use a device "
                "with more memory"
            )
        if rows < asked:
            warnings.warn(
                f"{asked} prompts a pass take at least {needed(batch, asked) / _GIB:.2f} GiB "
                f"beside the weights, and {has}: choose a batch size of {rows} or less",
                RuntimeWarning,
                stacklevel=3,
            )
            return


def _device(model: Any) -> torch.device | None:
    """The device of all weights; None where they lie on several."""
    # A Bridge does not list the weights of the Hugging Face model that it wraps.
    module = weight_module(model)
    devices = {weight.device for weight in module.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _control_groups(root: Path) -> Iterator[int]:
    """Bytes left in each control group that limits this process; none where there are none."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            folder, names = top / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            folder, names = top, ("memory.max", "memory.current")
        else:
            continue
        inner = folder / path.lstrip("/")
        # In a container the path is often that of the host, and the group's files are at the top.
        for group in dict.fromkeys((inner, folder)):
            # No such file or, of a group without a limit, the word "max".
            with suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text(encoding="utf-8")) for name in names)
                yield max(0, limit - used + _inactive_files(group / "memory.stat"))


def _inactive_files(stat: Path) -> int:
    """Bytes of cached files that the system gives back when memory is asked for."""
    counts = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    return int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))
