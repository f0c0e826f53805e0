"""The numbers as Markdown tables and a plot, and the header that says where they come from."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from workers import NAMES, US

import steerlens as sl

Answers = Mapping[str, Any]


def header(threads: int, versions: Mapping[str, Mapping[str, str]], *, quick: bool) -> Answers:
    """Machine, date and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "steerlens": sl.__version__,
        "versions": versions,
        "quick": quick,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(found: Answers) -> str:
    """All tables there are numbers for."""
    parts = [_header(found)]
    if "sweep" in found:
        parts += [_sweep(found, "all"), _sweep(found, "continuation"), _floor(found)]
    elif "agreement" in found:
        parts += [_agreement(found, positions) for positions in found["agreement"]]
    if "extract" in found:
        parts.append(_extraction(found))
    if "memory" in found:
        parts.append(_memory(found["memory"]))
    if "growth" in found:
        parts.append(_growth(found))
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def section(title: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading, a paragraph and a table."""
    return "\n\n".join([f"## {title}", *filter(None, [text]), table(columns, rows)])


def spread(seconds: Sequence[float], digits: int) -> list[str]:
    """Median, least and most."""
    return [f"{value:.{digits}f}" for value in (median(seconds), min(seconds), max(seconds))]


def _header(found: Answers) -> str:
    if "header" not in found:
        return "# Benchmark"
    head = found["header"]
    lines = [
        "# Benchmark",
        "",
        f"{head['date']}, {head['cpu']}, {head['cores']} cores ({head['threads']} threads used), "
        f"{head['platform']}, Python {head['python']}, steerlens {head['steerlens']}.",
        "",
    ]
    for name, versions in head["versions"].items():
        listed = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"- {NAMES[name]}: {listed}")
    if head["quick"]:
        lines += ["", "A quick run: it shows that everything works; its times say nothing."]
    return "\n".join(lines)


def _sweep(found: Answers, positions: str) -> str:
    plan, sweep = found["plan"], found["sweep"]
    all_seconds = sweep["seconds"][positions]
    ours = median(all_seconds[US])
    rows = []
    for name, seconds in all_seconds.items():
        differs = found["agreement"][positions][name]
        if not seconds:
            rows.append([f"{NAMES[name]} ({differs['unsupported']})", *["-"] * 7])
            continue
        middle = median(seconds)
        rows.append(
            [
                NAMES[name],
                *spread(seconds, 1),
                f"{middle / plan['n_cells']:.3f}",
                f"{middle / ours:.2f}",
                f"{differs['projection']:.1e}",
                f"{differs['logprob']:.1e}",
            ]
        )
    where = "all tokens" if positions == "all" else "the continuation's tokens only"
    how = (
        f"All {plan['n_cells']} cells timed"
        if plan["full"]
        else f"Seconds of {plan['n_cells']} cells, scaled from {sweep['peer_cells']} "
        f"({sweep['our_cells']} of steerlens)"
    )
    columns = ["contender", "median s", "min s", "max s", "s a cell", "x steerlens"]
    return section(
        f"Sweep, steering {where}",
        f"{how}; {plan['n_pairs']} pairs, {plan['rounds']} interleaved rounds, batches of "
        f"{plan['batch_size']}. Differences to steerlens: the largest of the sampled cells.",
        [*columns, "projection, relative", "logprob, nats"],
        rows,
    )


def _agreement(found: Answers, positions: str) -> str:
    rows = [
        [NAMES[name], *(_scientific(answer.get(key)) for key in ("projection", "logprob"))]
        for name, answer in found["agreement"][positions].items()
    ]
    columns = ["contender", "projection, relative", "logprob, nats"]
    return section(f"Differences to steerlens, steering {positions}", "", columns, rows)


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _floor(found: Answers) -> str:
    """What the counted blocks and label logits would cost at the bare model's own speed."""
    sweep = found["sweep"]
    rows = []
    for positions, raw in sweep["raw"].items():
        ours = raw[US]
        seconds = median(answer["seconds"] for answer in ours)
        equivalents = ours[0]["forward_equivalents"]
        for name, rates in sweep["rates"].items():
            forward = median(rate["positive"] for rate in rates)
            unembed = median(rate["unembed"] for rate in rates)
            # The unsteered model's labels too: hence the one.
            floor = equivalents * forward + (sweep["our_cells"] + 1) * unembed
            inside = "inside the Bridge" if name == US else "plain Hugging Face"
            rows.append(
                [
                    f"{positions}, {inside}",
                    f"{equivalents:.2f}",
                    f"{forward:.3f}",
                    f"{unembed:.3f}",
                    f"{floor:.1f}",
                    f"{seconds:.1f}",
                    f"{seconds / floor:.2f}",
                ]
            )
    columns = ["forward-equivalents", "forward s", "label logits s", "floor s", "steerlens s"]
    return section(
        "Against the floor",
        f"The floor of {sweep['our_cells']} cells: their forward-equivalents times one bare "
        "forward pass of the positive prompts without logits, and the label logits once a "
        "cell. The seconds of steerlens are of these cells, not scaled; its check of every "
        "hook on two prompts, the tables and the bootstrap are among them. With fewer pairs "
        "than a batch holds this is no floor: steerlens fills its passes with coefficients, "
        "and full passes cost less a token.",
        ["steering, bare model", *columns, "x floor"],
        rows,
    )


def _extraction(found: Answers) -> str:
    plan, extract = found["plan"], found["extract"]
    ours = median(extract["seconds"][US])
    names = {**NAMES, US: "steerlens `collect_differences`"}
    rows = [
        [
            names[name],
            *spread(seconds, 2),
            f"{median(seconds) / ours:.2f}",
            f"{extract['difference'][name]:.1e}",
        ]
        for name, seconds in extract["seconds"].items()
    ]
    for name, rates in extract["rates"].items():
        seconds = [rate["seconds"] for rate in rates]
        what = (
            "the model inside the Bridge, prompts sorted by length"
            if name == US
            else "plain Hugging Face, prompts as they come"
        )
        times = f"{median(seconds) / ours:.2f}"
        rows.append([f"bare forward: {what}", *spread(seconds, 2), times, "-"])
    return section(
        "Extraction",
        f"Last-token differences at all layers from {plan['extract_pairs']} pairs, "
        f"{plan['extract_rounds']} interleaved rounds. steering-vectors and repeng tokenise "
        "inside the time, as steerlens does; the others are given token ids. Difference: of "
        "the mean projections, relative, over the layers.",
        ["contender", "median s", "min s", "max s", "x steerlens", "difference"],
        rows,
    )


def _memory(rows: Sequence[Answers]) -> str:
    body = [
        [row["what"], *(f"{row[key]:.0f}" for key in ("loaded_mb", "peak_mb", "above_mb"))]
        for row in rows
    ]
    note = (
        ""
        if all(row["was_reset"] for row in rows)
        else " The system cannot reset a peak, so that of loading may hide the sweep's."
    )
    columns = ["contender", "loaded MB", "peak MB", "above MB"]
    return section("Peak memory", f"Resident memory of a fresh process each.{note}", columns, body)


def _growth(found: Answers) -> str:
    plan = found["plan"]
    rows = [
        [
            f"{row['size']} {row['varied']}",
            f"{row['seconds']:.1f}",
            f"{row['forward_equivalents']:.2f}",
            f"{row['seconds'] / row['forward_equivalents']:.2f}",
        ]
        for row in found["growth"]
    ]
    layers = ", ".join(map(str, plan["growth_layers"]))
    return section(
        "Growth",
        f"One size at a time, each once; else {plan['growth_pairs']} pairs "
        f"({plan['grow_tokens_pairs']} where the prompts' length grows), layers {layers}, "
        f"{plan['growth_coefficients']} coefficients, steering all tokens. "
        f"{found.get('plot', '')}",
        ["size", "seconds", "forward-equivalents", "s a forward-equivalent"],
        rows,
    )


def plot(path: Path, growth: Sequence[Answers]) -> str:
    """Seconds against each size as a PNG; says so where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "No plot: matplotlib is not installed."
    varied = list(dict.fromkeys(row["varied"] for row in growth))
    figure, axes = plt.subplots(1, len(varied), figsize=(4 * len(varied), 3.5), squeeze=False)
    for axis, name in zip(axes[0], varied, strict=True):
        rows = [row for row in growth if row["varied"] == name]
        axis.loglog([r["size"] for r in rows], [r["seconds"] for r in rows], "o-", base=2)
        axis.set_xlabel(name)
        axis.set_ylabel("seconds")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Plot: {path.name}."
