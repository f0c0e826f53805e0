"""Steering vectors and baked checkpoints on the Hugging Face hub, with a card from their record."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from steerlens.errors import InputError
from steerlens.files import strict_json
from steerlens.models.hooked_model import HookedModel
from steerlens.models.weight_processing import UNKNOWN
from steerlens.tables import shortened
from steerlens.validation import checked

FILE = "vector.safetensors"
CARD = "README.md"
Self = TypeVar("Self", bound="OnTheHub")


@checked
class OnTheHub:
    """What a steering vector does with the Hugging Face hub."""

    def push_to_hub(
        self,
        repo: str,
        *,
        effects: pd.DataFrame | str | Path | None = None,
        private: bool = False,
    ) -> str:
        """Upload the vector as `vector.safetensors`, with a model card from its record.

        Args:
            repo: OWNER/NAME; made where it is not there. The client's own login is used.
            effects: what it does and costs, with intervals, for the card: the
                `recommendation.json` of `steerlens recommend`, or a table, such as rows of
                `compare(...).summary`. Default: the card says that it is not recorded.
            private: of a new repository.

        Returns:
            The address of the commit.

        Raises:
            InputError: the file is no recommendation or that of other hooks, or the hub, or the way
                to it, refuses.
        """
        vector: Any = self
        told = effects if effects is None or isinstance(effects, pd.DataFrame) else Path(effects)
        card = vector_card(vector, repo, effects=told)
        return _push(repo, {FILE: vector.to_bytes(), CARD: card.encode()}, private=private)

    @classmethod
    def from_hub(
        cls: type[Self], repo: str, *, revision: str | None = None, model: HookedModel | None = None
    ) -> Self:
        """Fetch and read what `push_to_hub` uploaded.

        Args:
            repo: OWNER/NAME.
            revision: a branch, tag or commit, the newest by default.
            model: as in `load`.

        Raises:
            InputError: the file cannot be fetched, or as `load`.
        """
        from huggingface_hub import HfApi

        try:
            path = HfApi().hf_hub_download(repo, FILE, revision=revision)
        except Exception as error:  # the client's transport has errors of its own
            raise InputError(f"cannot fetch {FILE} of {repo!r} from the hub: {error}") from error
        kind: Any = cls
        loaded: Self = kind.load(path, model=model)
        return loaded


@checked
def push_checkpoint(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder that `bake` or `to_peft` wrote, with a model card from its record.

    Args:
        folder: with `steerlens.json`.
        repo: OWNER/NAME; made where it is not there. The client's own login is used.
        private: of a new repository.

    Returns:
        The address of the commit.

    Raises:
        InputError: the folder has no record, or the hub, or the way to it, refuses.
    """
    folder = Path(folder)
    try:
        record = strict_json((folder / "steerlens.json").read_text(encoding="utf-8"))
        files: dict[str, Any] = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and path.resolve().is_relative_to(folder.resolve())
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        }
        library = "peft" if "adapter_config.json" in files else "transformers"
        card = checkpoint_card(record, repo, library)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"expected a folder that bake or to_peft wrote, with its steerlens.json, got "
            f"{str(folder)!r}: {error}"
        ) from error
    return _push(repo, {**files, CARD: card.encode()}, private=private)


def _push(repo: str, content: Mapping[str, bytes | Path], *, private: bool) -> str:
    """One commit of these files. Returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if repo.count("/") != 1:
        raise InputError(f"expected OWNER/NAME, got {repo!r}")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=value)
        for name, value in content.items()
    ]
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        done = HfApi().create_commit(repo, operations, commit_message="Upload by steerlens")
    except Exception as error:  # the client's transport has errors of its own
        raise InputError(f"cannot upload to {repo!r} on the hub: {error}") from error
    return str(done.commit_url)


def vector_card(vector: Any, repo: str, *, effects: pd.DataFrame | Path | None = None) -> str:
    """The model card of a steering vector (Markdown)."""
    known, described = vector.calibration, dict(vector.describe())
    model = described.get("model", UNKNOWN)
    hooks = pd.DataFrame(
        {
            "hook": vector.hook_names,
            "scale": vector.scale.tolist(),
            "mean residual norm": known.resid_norm.tolist(),
            "boundary -": known.boundary_neg.tolist(),
            "boundary +": known.boundary_pos.tolist(),
        }
    )
    cost = "It has no measured coherence boundary, so what a coefficient costs is not known."
    if known.budget != UNKNOWN:
        cost = (
            "The boundaries are the largest coefficients of each sign, in residual units, that "
            f"keep the damage within {_text(known.budget)} (text: {_text(known.text)}), "
            f"{'all hooks pushed at once' if known.is_joint else 'each hook alone'}: that is what "
            '"100%" costs.'
        )
    parts = [
        _head(model, "steerlens", "steering-vector"),
        f"# {_text(repo)}",
        f"A steering vector for {_text(model)}, made by steerlens. "
        f"Operator {_text(described.pop('operator'))}, condition "
        f"{_text(described.pop('condition'))}. `blocks.N.hook_resid_post` is the output of block "
        "N, counted from 0.",
        _table(hooks),
        cost,
        "## Effect",
        _effects(effects, vector.hook_names),
        "## How it was made",
        _list(described),
        "## Use",
        "```python\nimport steerlens as sl\n\n"
        f"model = sl.load_model({model!r})\n"
        f"vector = sl.SteeringVector.from_hub({repo!r}, model=model)\n"
        f"with sl.steer(model, vector, {_coefficient(vector)}):\n"
        '    print(model.generate("The weather today is", max_new_tokens=20))\n```',
    ]
    return "\n\n".join(parts) + "\n"


def checkpoint_card(record: Mapping[str, Any], repo: str, library: str) -> str:
    """The model card of a checkpoint or adapter with a vector in it (Markdown)."""
    model, vector = record["model"], record["vector"]
    changed = record.get("added") or dict.fromkeys(record["ablated"], "ablated")
    parts = [
        _head(model["name"], library, "steered"),
        f"# {_text(repo)}",
        f"{_text(model['name'])} with a steering vector in it, by steerlens: "
        f"{_text(record['what'])}. Coefficient {_text(record['coefficient'])}; boundary of the "
        f"vector: {_text(vector['boundary'])}.",
        "## What was changed",
        _list(changed),
        "## How the vector was made",
        _list(vector),
        "## The model",
        _list(model),
    ]
    return "\n\n".join(parts) + "\n"


def _effects(effects: pd.DataFrame | Path | None, hook_names: Sequence[str]) -> str:
    """A table of effects, or what a `recommendation.json` says of a vector at these hooks."""
    if effects is None:
        return "Not recorded."
    if isinstance(effects, pd.DataFrame):
        return _table(effects)
    try:
        found = strict_json(effects.read_text(encoding="utf-8"))
        rows = [{"sign": sign, **row} for sign, row in found["signs"].items() if row]
        reasons = [f"- {_text(reason)}" for reason in found["reasons"]]
        verdict = "" if found["steer"] else "It is recommended not to steer with it."
        others = {str(row["hook_name"]) for row in rows} - {*hook_names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"expected the recommendation.json of `steerlens recommend`, got {str(effects)!r}: "
            f"{error!r}"
        ) from error
    if others:
        raise InputError(
            f"{str(effects)!r} is of another vector: at {', '.join(sorted(others))}, and this one "
            f"is at {', '.join(hook_names)}"
        )
    told = (
        "Measured on held-out groups: `effect` in nats per token with its 95% interval; `p`, the "
        "rank of the effect times the agreement of the groups among directions fitted with the "
        "labels of groups flipped; `cost_nats` and `cost_kl_nats`, the damage to the model's own "
        "text, per token."
    )
    table = [_table(pd.DataFrame(rows)), told] if rows else []
    return "\n\n".join(filter(None, [verdict, *table, "\n".join(reasons)]))


def _coefficient(vector: Any) -> str:
    """A coefficient that has a meaning for the vector, as an argument."""
    if bool(vector.calibration.boundary_pos.isfinite().all()):
        return '"50%"'
    return {"rotate": "10"}.get(vector.operator.name, "1")


def _head(model: str, library: str, tag: str) -> str:
    """The card's YAML."""
    from huggingface_hub import ModelCardData

    base = model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) else None
    data = ModelCardData(library_name=library, tags=["steerlens", tag], base_model=base)
    return f"---\n{data.to_yaml()}\n---"


def _text(value: Any) -> str:
    """Text of a record on one line, without what Markdown or HTML would obey."""
    line = shortened(value, 400)
    escapes = (("&", "&amp;"), ("\\", "&#92;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"))
    for sign, shown in escapes:
        line = line.replace(sign, shown)
    return line.replace("[", "\\[").replace("]", "\\]")


def _list(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in values.items())


def _table(table: pd.DataFrame) -> str:
    rows = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in table.to_numpy()]
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1], *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines)
