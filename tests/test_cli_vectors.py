"""`steerlens extract`, `generate`, `export`, `bake` and `vectors`."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import ESC, SHOWN, Main, assert_error, assert_visible, content, finish

import steerlens as sl
from steerlens.data.prompts import Message
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.errors import ModelError
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.steering import generate
from steerlens.tables import read_csv

pytestmark = pytest.mark.usefixtures("loaded_once")
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def steered(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens generate` on the small model."""
    return lambda *arguments: run(
        *("generate", "--model", model_folder, "--pairs", pairs_file, "--prompt", "you are"),
        *("--layer", "1", "--max-new-tokens", "3", "--coefficients=-90,0,90"),
        *arguments,
    )


@pytest.fixture
def extract(run: Main, model_folder: Path, pairs_file: Path) -> Main:
    """`steerlens extract` on one layer of the small model; a later option overrides these."""
    return lambda *arguments: run(
        *("extract", "--model", model_folder, "--pairs", pairs_file, "--layers", "1"),
        *("--budget", "nats=0.1"),
        *arguments,
    )


@pytest.fixture(scope="module")
def file(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `extract` writes, to be read."""
    out = tmp_path_factory.mktemp("vector") / "v.safetensors"
    data = ("--model", model_folder, "--pairs", pairs_file, "--layers", "1", "--budget", "nats=0.1")
    finish("extract", *data, "--out", out, "--quiet")
    return out


def cells(printed: str) -> list[list[str]]:
    """The rows of a table of two."""
    return [
        [cell.strip() for cell in line.strip("┃│ ").replace("┃", "│").split("│")]
        for line in printed.splitlines()
        if line.startswith(("┃", "│"))
    ]


# extract


def test_extract_writes_a_vector_with_its_boundary(
    extract: Main, file: Path, tmp_path: Path, loaded: Any, pairs_file: Path
) -> None:
    out = tmp_path / "new" / "v.safetensors"
    outcome = extract("--out", out)
    assert outcome.code == 0
    assert list(content(tmp_path / "new")) == ["v.safetensors"]
    vector = sl.SteeringVector.load(out)
    vector.check_model(loaded)
    pairs = sl.ContrastivePairs.load(pairs_file)
    directions = sl.fit_directions(sl.collect_differences(loaded, pairs, layers="1"))
    torch.testing.assert_close(vector[HOOK], directions[HOOK])
    found = sl.find_boundary(loaded, pairs, directions, budget="nats=0.1").layers
    assert vector.calibration.boundary_pos.tolist() == pytest.approx(found.boundary_pos.tolist())
    assert vector.calibration.budget == "nats=0.1"
    assert vector.origin.dataset == pairs.name
    assert f"{found.boundary_pos[0]:.4g}" in outcome.out
    assert out.read_bytes() == file.read_bytes()  # again, the same


def test_extract_of_several_layers_and_operators(extract: Main, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    more = ("--layers", "0:3", "--method", "pca", "--no-boundary")
    assert extract("--out", out, *more, "--operator", "clamp", "--value", "2.5").code == 0
    vector = sl.SteeringVector.load(out)
    assert len(vector) == 3
    assert vector.operator == sl.Clamp(2.5)
    assert vector.origin.method == "pca"
    assert vector.calibration.boundary_pos.isnan().all()
    assert bool((vector.calibration.resid_norm > 0).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "v.pt"], [".safetensors"]),
        (["--operator", "shift"], ["shift"]),
        (["--operator", "clamp"], ["value"]),
        (["--layers", "99"], ["layer 99"]),
        (["--method", "none"], ["none"]),
        (["--budget", "x"], ["budget"]),
        (["--pairs", "missing.jsonl"], ["missing.jsonl"]),
        (["--on", "missing.txt"], ["missing.txt"]),
    ],
)
def test_extract_refuses(
    options: list[str], words: list[str], extract: Main, tmp_path: Path
) -> None:
    outcome = extract("--quiet", "--out", tmp_path / "v.safetensors", *options)
    assert_error(outcome, *words)
    assert content(tmp_path) == {}


# generate


def test_generate_prints_a_column_for_each_coefficient(
    steered: Main, loaded: Any, pairs_file: Path
) -> None:
    outcome = steered("--raw")
    assert outcome.code == 0
    assert "you are" in outcome.out
    header, row = cells(outcome.out)
    assert header == ["-90", "0", "90"]
    pairs = sl.ContrastivePairs.load(pairs_file)
    steer = {HOOK: sl.fit_directions(sl.collect_differences(loaded, pairs, layers="1"))[HOOK]}
    prompt = tokenize_prompt(loaded, "you are")
    expected = [generate(loaded, prompt, steer, c, max_new_tokens=3) for c in (-90, 0, 90)]
    assert row == expected
    # Steering this hard must show, or the columns could be in any order.
    assert len(set(row)) == 3


@pytest.mark.parametrize(
    ("options", "prompt"),
    [([], (Message("user", "you are"),)), (["--raw"], "you are")],
)
def test_generate_uses_the_chat_template_unless_raw(
    options: list[str], prompt: Any, steered: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def tokenize(model: Any, given: Any) -> Any:
        seen.append(given)
        return tokenize_prompt(model, given)

    monkeypatch.setattr("steerlens.engine.tokenize_prompt", tokenize)
    assert steered(*options).code == 0
    assert seen == [prompt]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "99"], ["layer 99"]),
        (["--coefficients=nan"], ["'nan'"]),
        (["--coefficients=x"], ["'x'"]),
        (["--coefficients="], ["coefficient"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--prompt", "", "--raw"], ["prompt"]),
        (["--pairs", "missing.jsonl"], ["missing.jsonl"]),
        (["--prompt", " ".join(["sun"] * 80)], ["context"]),
    ],
)
def test_generate_refuses(options: list[str], words: list[str], steered: Main) -> None:
    """`test_generate_prints_a_column_for_each_coefficient` is the control."""
    assert_error(steered("--quiet", *options), *words)


def test_generate_with_a_vector(run: Main, file: Path, loaded: Any) -> None:
    ask = ("generate", "--vector", file, "--prompt", "you are", "--raw", "--max-new-tokens", "3")
    outcome = run(*ask, "--coefficients=900%,0,2norm,90")
    assert outcome.code == 0
    header, row = cells(outcome.out)
    assert header == ["900%", "0", "2norm", "90"]
    # The model is the one the vector was made on.
    vector = sl.SteeringVector.load(file)
    prompt = tokenize_prompt(loaded, "you are")
    assert row == [generate(loaded, prompt, vector, c, max_new_tokens=3) for c in header]
    assert len(set(row)) > 1
    last = run(*ask, "--coefficients", "90", "--positions", "last").out
    assert generate(loaded, prompt, vector, 90, max_new_tokens=3, positions="last") in last


def test_generate_with_a_vector_refuses(run: Main, file: Path) -> None:
    ask = ("generate", "--quiet", "--vector", file, "--prompt", "you are")
    assert_error(run(*ask, "--layer", "2"), "there is no direction", "blocks.2")
    assert_error(run(*ask, "--coefficients", "80 %%"), "80 %%")
    assert_error(run(*ask, "--positions", "first"), "first")
    assert_error(run(*ask[:3], file.with_name("none.safetensors"), *ask[4:]), "No such file")


def test_a_model_that_a_file_names_is_not_fetched_unasked(
    run: Main, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    """A packaged one and a local one are taken; any other when --model names it."""
    asked: list[str] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(name)
        raise ModelError("loaded")

    monkeypatch.setattr("steerlens.load_model", load)
    monkeypatch.chdir(tmp_path)
    vector, foreign = sl.SteeringVector.load(file), tmp_path / "foreign.safetensors"
    commands = (
        ("generate", "--vector", foreign, "--prompt", "you"),
        ("bake", foreign, "--coefficient", "1", "--out", tmp_path / "baked"),
    )
    fetched = ("gpt2", "some/one's", "//host/share", "\\\\host\\share", "x.gguf", "~no/x.gguf")
    (tmp_path / "here.gguf").touch()
    for name in (*fetched, DEFAULT_MODEL, str(model_folder), "here.gguf"):
        replace(vector, origin=replace(vector.origin, model=name)).save(foreign)
        for command in commands:
            if name in fetched:
                told = run(*command)
                assert_error(told, "foreign.safetensors", f"--model {shlex.quote(name)}")
                assert asked == []
                assert_error(run(*command, "--model", name), "loaded")
            else:
                assert_error(run(*command), "loaded")
            assert asked == [name]
            asked.clear()


# export, bake


def test_export_and_back(run: Main, file: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "v.gguf", tmp_path / "again.safetensors"
    assert run("export", file, there).code == 0
    assert sl.export.from_gguf(there) == sl.SteeringVector.load(file)
    assert run("export", there, back, "--quiet").code == 0
    assert back.read_bytes() == file.read_bytes()
    assert_error(run("export", file, tmp_path / "v.bin"), ".gguf or .safetensors")
    assert_error(run("export", tmp_path / "none.gguf", back), "none.gguf")


def test_export_at_a_coefficient(run: Main, file: Path, tmp_path: Path) -> None:
    harness, adapter = tmp_path / "v.pt", tmp_path / "adapter"
    assert run("export", file, harness, "--to", "lm-eval", "--coefficient", "4").code == 0
    assert torch.load(harness, weights_only=True)["layers.1"]["steering_coefficient"] == 4
    assert run("export", file, adapter, "--to", "peft", "--coefficient=-4").code == 0
    assert (adapter / "adapter_config.json").is_file()
    spec, fields = tmp_path / "v.json", tmp_path / "s.pt"
    assert run("export", file, spec, "--to", "easysteer", "--coefficient", "4").code == 0
    assert json.loads(spec.read_text())["vectors"][0]["layers"] == [1]
    assert run("export", file, fields, "--to", "steering-vectors").code == 0
    assert list(torch.load(fields, weights_only=True)["layer_activations"]) == [1]
    for options, words in (
        (["--to", "lm-eval"], "coefficient"),
        (["--to", "vllm", "--coefficient", "4"], "EasySteer's alone"),
        (["--to", "repeng"], "read the .gguf"),
        (["--to", "steering-vectors", "--coefficient", "4"], "as multiplier"),
        (["--coefficient", "4"], "--to easysteer, lm-eval and peft"),
        (["--to", "lm-eval", "--coefficient", "4", "--model", "x"], "lm-eval loads its own"),
        (["--to", "peft", "--coefficient", "4,5"], "one --coefficient"),
    ):
        assert_error(run("export", file, tmp_path / "w.pt", *options), words)
    assert_error(run("export", file, adapter, "--to", "peft", "--coefficient=4"), "not empty")


def test_bake_writes_a_checkpoint(run: Main, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    outcome = run("bake", file, "--coefficient", "50%", "--out", out)
    assert outcome.code == 0
    baked = transformers.AutoModelForCausalLM.from_pretrained(out)
    vector = sl.SteeringVector.load(file)
    expected = 0.5 * vector.calibration.boundary_pos[0] * vector[HOOK]
    torch.testing.assert_close(baked.model.layers[1].mlp.down_proj.bias.detach(), expected)
    assert not baked.model.layers[0].mlp.down_proj.bias.any()
    assert json.loads((out / "steerlens.json").read_text())["coefficient"] == "50%"
    assert_error(run("bake", file, "--coefficient", "1", "--out", out), "not empty")
    # The negative boundary of this model lies beyond what was searched.
    beyond = run("bake", file, "--coefficient=-50%", "--quiet", "--out", tmp_path / "x")
    assert_error(beyond, "beyond the searched range")
    assert_error(run("bake", file, "--coefficient", "1,2", "--out", tmp_path / "x"), "one")


# vectors


def test_vectors_show(run: Main, file: Path) -> None:
    outcome = run("vectors", "show", file)
    assert outcome.code == 0
    for word in ("mean_diff", HOOK, "nats=0.1, on positive text", "chat_template", "versions"):
        assert word in outcome.out
    norm = sl.SteeringVector.load(file).calibration.resid_norm[0]
    assert f"{norm:.4g}" in outcome.out


def test_vectors_compare(run: Main, extract: Main, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "pca.safetensors"
    more = ("--method", "pca", "--layers", "1,2", "--no-boundary", "--quiet")
    assert extract("--out", other, *more).code == 0
    outcome = run("vectors", "compare", file, other)
    assert outcome.code == 0
    table = sl.measure.cosine_table(
        {path.name: sl.SteeringVector.load(path) for path in (file, other)}
    )
    assert len(table) == 3
    for cosine in table.cosine:
        assert f"{cosine:.4g}" in outcome.out
    assert_error(run("vectors", "compare", file, file), "twice")
    assert_error(run("vectors", "compare", file), "two or more directions")


# What a terminal would obey


def test_texts_of_others_are_shown_and_not_obeyed(run: Main, file: Path, tmp_path: Path) -> None:
    vector = sl.SteeringVector.load(file)
    known = replace(vector.calibration, budget=ESC, text="x\n  model: y")
    other = tmp_path / f"{ESC}.safetensors"
    origin = replace(vector.origin, model=ESC, chat_template=ESC, dataset=ESC)
    replace(vector, calibration=known, origin=origin).save(other)
    told = run("vectors", "show", other)
    assert_visible(told, f"model:{SHOWN}", rf"{SHOWN},onx\nmodel:y")
    assert_visible(run("vectors", "compare", file, other), SHOWN)
    assert_visible(run("export", other, tmp_path / f"{ESC}.gguf"), f"{SHOWN}.gguf")
    option = "--" + ESC.replace("\r", "")
    assert_visible(run("vectors", "show", option), SHOWN.replace(r"\r", ""))


def test_generated_text_keeps_its_lines(steered: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "steerlens.steering.decoded",
        lambda *args, **options: f"{ESC}\nnext\u200d",
    )
    outcome = steered("--raw", "--prompt", f"you {ESC}", "--coefficients=0")
    assert_visible(outcome, SHOWN, keep="\n\u200d")
    assert ["next\u200d"] in cells(outcome.out)


def test_how_prompts_are_read_and_rendered(
    run: Main, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """A span as the position, an argument of the template, both recorded in the vector."""
    words = ("extract", "--model", model_folder, "--pairs", pairs_file, "--layers", "1", "--quiet")
    for position, kept in (("-3:", "-3::mean"), ("last", "-1")):
        out = tmp_path / f"{kept[-1]}.safetensors"
        done = run(*words, "--no-boundary", f"--position={position}", "--out", out)
        assert done.code == 0, done
        assert sl.SteeringVector.load(out).origin.position == kept
    say = ("generate", "--vector", out, "--model", model_folder, "--prompt", "you")
    few = ("--coefficients=2", "--max-new-tokens", "3", "--quiet")
    few += ("--positions", "last+generated[0:2]")
    assert run(*say, *few).code == 0
    told = run(*say, *few, "--template-args", "bos_token=</s>")
    assert told.code == 0
    for wrong, message in (
        (("--template-args", "enable_thinking=false"), "reads no argument 'enable_thinking'"),
        (("--template-args", "enable_thinking"), "name=value"),
        (("--straddle", "on"), "--straddle is error or back"),
        (("--positions", "first"), "positions are all, prompt"),
    ):
        assert_error(run(*say, *few, *wrong), message)
    assert_error(run(*words, "--position", "first", "--out", out), "expected a position such as")


# read


def test_read_says_tokens_texts_and_neighbours(
    run: Main, file: Path, loaded: Any, tmp_path: Path
) -> None:
    vector = sl.SteeringVector.load(file)
    for name, other in (("near", 2 * vector), ("far", other_than(vector))):
        other.save(tmp_path / f"{name}.safetensors")
    (tmp_path / "texts.txt").write_text("you are cheerful\nthe river was so cold\n")
    out, page = tmp_path / "v.csv", tmp_path / "v.html"
    outcome = run(
        *("read", file, "--texts", tmp_path / "texts.txt", "--tokens", "2", "--out", out),
        *("--page", page, "--beside", tmp_path / "far.safetensors"),
        *("--beside", tmp_path / "near.safetensors"),
    )
    assert outcome.code == 0
    table = read_csv(out, "vocabulary")
    assert table.token_id.tolist() == (
        sl.measure.vocabulary(loaded, vector, n_tokens=2).token_id.tolist()
    )
    for word in (*table.raw_token, "the river was so cold", "random"):
        assert word in outcome.out
    assert outcome.out.index("near.safetensors") < outcome.out.index("far.safetensors")
    assert "What the direction says" in page.read_text()


def other_than(vector: sl.SteeringVector) -> sl.SteeringVector:
    """One at a right angle to it."""
    row = torch.zeros(vector.d_model)
    row[0], row[1] = -vector[HOOK][1], vector[HOOK][0]
    return sl.SteeringVector.from_vectors({HOOK: row})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--page", "v.txt"], ["--page", ".html"]),
        (["--texts", "missing.txt"], ["missing.txt"]),
        (["--jacobian", "missing/lens.pt"], ["JacobianLens"]),
        (["--beside", "missing.safetensors"], ["missing.safetensors"]),
    ],
)
def test_read_refuses(
    options: list[str], words: list[str], run: Main, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.csv"
    assert_error(run("read", file, "--quiet", "--out", out, *options), *words)
    assert not out.exists()
    assert_error(run("read", file, "--beside", file), "given twice")
