"""Where a steering vector comes from, as its file records it."""

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from steerlens.directions.directions import Directions
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import Provenance, check_fitted_on, provenance
from steerlens.models.weight_processing import UNKNOWN

_OF_THE_MODEL = (
    *("revision", "file_hash", "weights", "weight_processing", "dtype", "architecture"),
    *("tokenizer", "chat_template"),
)


@dataclass(frozen=True)
class Origin:
    """The model, data and method of a steering vector; "unknown" where not recorded.

    `model` is the model's name; the fields from `revision` to `chat_template` are as in
    `Provenance`. `pairs` is the fingerprint of the pairs' content, `dataset` their name,
    `pair_hashes` their `prompt_hashes`, none where not recorded. `method`, `position` (of the token
    that was read) and `seed` are those of the directions, `versions` those of the packages. Raises
    `InputError` when a field is not text.
    """

    model: str = UNKNOWN
    revision: str = UNKNOWN
    file_hash: str = UNKNOWN
    weights: str = UNKNOWN
    weight_processing: str = UNKNOWN
    dtype: str = UNKNOWN
    architecture: str = UNKNOWN
    tokenizer: str = UNKNOWN
    chat_template: str = UNKNOWN
    dataset: str = UNKNOWN
    pairs: str = UNKNOWN
    method: str = UNKNOWN
    position: str = UNKNOWN
    seed: str = UNKNOWN
    versions: str = UNKNOWN
    pair_hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pair_hashes, tuple):
            raise InputError(f"the origin's pair_hashes are a tuple, not {self.pair_hashes!r}")
        for name, value in asdict(self).items():
            for text in value if name == "pair_hashes" else [value]:
                # A lone surrogate is text that cannot be written anywhere.
                if not isinstance(text, str) or text != text.encode("utf-8", "ignore").decode():
                    raise InputError(f"the origin's {name} is text, not {text!r}")

    @classmethod
    def of(cls, model: HookedModel, directions: Directions, *, dataset: str = UNKNOWN) -> "Origin":
        """The origin of directions fitted on `model`; `dataset` is the name of their pairs.

        Raises `InputError` when they were fitted on a model with other weight processing.
        """
        check_fitted_on(model, directions)
        here = provenance(model)
        return replace(
            cls.of_model(model),
            dataset=dataset,
            pairs=directions.fingerprint,
            pair_hashes=directions.pair_hashes,
            method=directions.method,
            position=str(directions.position),
            seed=str(directions.seed),
            versions=f"steerlens {version('steerlens')}, transformer-lens {here.transformer_lens}, "
            f"transformers {here.transformers}, torch {here.torch}",
        )

    @classmethod
    def of_model(cls, model: HookedModel) -> "Origin":
        """The fields that a model alone gives."""
        here = provenance(model, fingerprints=True)
        return cls(model=here.name, **{name: getattr(here, name) for name in _OF_THE_MODEL})

    @property
    def provenance(self) -> Provenance:
        """That of the model, as far as it is recorded."""
        return Provenance(name=self.model, **{name: getattr(self, name) for name in _OF_THE_MODEL})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict."""
        return asdict(self)

    def combined(self, other: "Origin", how: str) -> "Origin":
        """That of what is made of both: `how` has a place for each where they differ."""

        def both(field: str) -> str:
            values = getattr(self, field), getattr(other, field)
            return values[0] if values[0] == values[1] else how.format(*values)

        hashes = tuple(dict.fromkeys(self.pair_hashes + other.pair_hashes))
        fields = {f: both(f) for f in ("method", "dataset", "pairs", "position", "seed")}
        return replace(self, pair_hashes=hashes, **fields)

    def differences(self, other: "Origin") -> list[str]:
        """What tells the models of two origins apart, in words; what is not known differs not."""
        return self.provenance.differences(other.provenance)
