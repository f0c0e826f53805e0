"""Scorers that are fitted or loaded, and how scorers are named."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_tokenizer
from test_scorers import said, some_texts, wrote

import steerlens as sl
from steerlens.errors import HookError, InputError, ModelError
from steerlens.measure.scorers import (
    SCORERS,
    Classifier,
    Endpoint,
    Probe,
    Written,
    scorer_name,
    scorers_of,
)


@pytest.fixture(scope="module")
def texts(llama: Any) -> list[Written]:
    return some_texts(llama)


# A probe and a classifier


@pytest.mark.parametrize("method", ["mean_diff", "probe"])
def test_probe_by_hand(
    llama: Any, many: sl.ContrastivePairs, texts: list[Written], method: Any
) -> None:
    hook, position = "blocks.3.hook_resid_post", "-3:"
    differences = sl.collect_differences(llama, many, layers=[3], position=position)
    axis = sl.fit_directions(differences, method=method)[hook].double()
    up, down = ((side[0].double() @ axis).mean() for side in sides_of(differences))

    def at(text: Written) -> float:
        found: list[torch.Tensor] = []
        with torch.no_grad(), llama.hooks(fwd_hooks=[(hook, lambda x, hook: found.append(x))]):
            llama(torch.tensor([[*text.prompt_ids, *text.ids]]))
        read = found[0][0, len(text.prompt_ids) :].double().mean(0) @ axis
        return float((2 * read - up - down) / (up - down))

    probe = Probe(llama, many, 3, method, position)
    values = probe([*texts, said("")])
    assert values[:-1] == pytest.approx([at(text) for text in texts], rel=1e-3)
    assert math.isnan(values[-1])
    assert probe(texts[::-1]) == pytest.approx(values[-2::-1], rel=1e-3)


def sides_of(differences: sl.Differences) -> tuple[torch.Tensor, torch.Tensor]:
    return differences.positive, differences.negative


def test_a_probe_is_1_and_minus_1_at_the_means_of_the_sides(
    llama: Any, continued: sl.ContrastivePairs
) -> None:
    probe = Probe(llama, continued, 2, position="continuation")
    for side, value in (("positive", 1), ("negative", -1)):
        written = [wrote(llama, getattr(p, side), str(p.continuation).strip()) for p in continued]
        assert sum(probe(written)) / len(written) == pytest.approx(value, abs=1e-3)


def test_a_probe_is_fitted_on_what_the_model_writes(
    llama: Any, continued: sl.ContrastivePairs
) -> None:
    few = continued[:2]
    own = sl.collect_differences(llama, few, layers=[2], position="own")
    axis = sl.fit_directions(own, method="probe")["blocks.2.hook_resid_post"]
    assert torch.equal(Probe(llama, few, 2)._fitted[0], axis)
    assert not torch.equal(Probe(llama, few, 2, position="continuation")._fitted[0], axis)
    with pytest.raises(HookError, match="9"):
        Probe(llama, continued, 9)


def labelled(texts: list[str], **options: Any) -> list[Any]:
    assert options == {"top_k": None, "truncation": True}
    return [[{"label": "X", "score": len(t) / 10}, {"label": "Y", "score": 0.5}] for t in texts]


def test_a_classifier_gives_the_score_of_a_label() -> None:
    values = Classifier(labelled, "X")([said("abc"), said(" "), said("a")])
    assert values == pytest.approx([0.3, math.nan, 0.1], nan_ok=True)
    assert Classifier(labelled, "Y")([said("abc")]) == [0.5]
    with pytest.raises(InputError, match="no label 'Z'; it has X, Y"):
        Classifier(labelled, "Z")([said("abc")])
    for wrong in ([{"label": "X", "score": 1}], ["X"], [[{"name": "X"}]]):
        with pytest.raises(InputError, match="text-classification pipeline"):
            Classifier(lambda texts, of=wrong, **_: of, "X")([said("abc")])


def test_a_classifier_of_a_folder_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=160, intermediate_size=8, id2label={0: "COLD", 1: "WARM"}, **sizes
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    cold, warm = (
        Classifier.load(str(tmp_path), label)([said("the soup"), said("rain")])
        for label in ("COLD", "WARM")
    )
    assert [a + b for a, b in zip(cold, warm, strict=True)] == pytest.approx([1, 1])
    assert warm[0] != warm[1]
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier.load(str(tmp_path / "gone"), "WARM")


# By name


def test_scorers_by_name(llama: Any, pairs: sl.ContrastivePairs, tmp_path: Path) -> None:
    words = tmp_path / "glad.txt"
    words.write_text("glad")
    names = "logprob concept distinct_2 repeated_4 length ended script probe description choice"
    scorers = scorers_of(
        [*names.split(), f"words={words}", "judge"],
        llama,
        pairs[:2],
        descriptions=("kind", "rude"),
        endpoint=Endpoint("http://127.0.0.1:9", "none"),
    )
    assert [scorer_name(scorer) for scorer in scorers] == [*names.split(), "words_glad", "judge"]
    by_name = {scorer_name(scorer): scorer for scorer in scorers}
    assert (by_name["probe"].layer, by_name["judge"].concept) == (3, "kind")  # type: ignore[attr-defined]
    assert by_name["choice"].letters  # type: ignore[attr-defined]
    [asked] = scorers_of(["choice"], llama, pairs, question="was it kind ?")
    assert asked.options == ("yes", "no")  # type: ignore[attr-defined]
    # Every name that is listed is known.
    listed = {re.split("[_=]", name)[0] for name in SCORERS}
    assert listed == {re.split("_", scorer_name(s))[0] for s in scorers} | {"classifier"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["logprobs"], "no scorer 'logprobs'; there are logprob, concept"),
        (["distinct_0"], "no scorer"),
        (["words="], "no scorer"),
        (["classifier=name"], "no scorer"),
        (["words=/nowhere.txt"], "/nowhere.txt"),
        (["length", "length"], "two scorers are called 'length'"),
        (["description"], "needs descriptions"),
        (["choice"], "needs a question"),
        (["judge"], "needs descriptions"),
    ],
)
def test_names_that_cannot_be_had(
    llama: Any, pairs: sl.ContrastivePairs, names: list[str], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        scorers_of(names, llama, pairs)
