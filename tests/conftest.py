"""Models for the tests: tiny random-init ones, built without network, and the real one."""

import atexit
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
import transformers
from hooked import hooked_transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import steerlens as sl
from steerlens.engine import batches
from steerlens.engine.tokenization import tokenize_prompt

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' %} \n {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = """the a river walk was is I you are cheerful gloomy kind rude good bad day night how what
went by and or not very so it sun rain soup bread warm cold said felt today tomorrow""".split()


def build_tokenizer(*, words: Sequence[str] = WORDS, **options: Any) -> Any:
    """Words and single characters as tokens; BOS is `<s>`, id 1."""
    vocab = ["<unk>", "<s>", "</s>", "<pad>", *words, *map(chr, range(33, 127)), "\n"]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(vocab))}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    } | options
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    # TransformerLens loads a tokenizer once more from its folder, so it needs one.
    folder = tempfile.mkdtemp(prefix="steerlens-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def build_llama(
    *, n_layers: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random-init Llama with grouped-query attention and a context of 64."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    config = transformers.LlamaConfig(**settings | changes)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def build_gpt2(*, seed: int = 0) -> Any:
    """A random-init GPT-2: learned positions, so that a shift by padding would show."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=160,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


IS_TL3 = version("transformer-lens").startswith("3.")
collect_ignore = [] if IS_TL3 else ["tl3"]  # which `make test-tl3` runs
ATTN_OUT = "hook_attn_out" if IS_TL3 else "attn.hook_out"
"""Where a block's attention is written, inside the block."""
FINAL_NORM = "ln_final.hook_normalized" if IS_TL3 else "ln_final.hook_out"

Swept = Callable[..., sl.measure.SweepResult]
Bounded = Callable[..., sl.measure.BoundaryResult]
Studies = Callable[..., sl.Study]

needs_bridge = pytest.mark.skipif(IS_TL3, reason="of a TransformerBridge alone")


def bridge(hf_model: Any, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """In TransformerLens: a `TransformerBridge`; with its version 3, a `HookedTransformer`."""
    if IS_TL3:
        return hooked_transformer(hf_model, tokenizer or build_tokenizer(), dtype)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "tiny",
        hf_model=hf_model,
        tokenizer=tokenizer or build_tokenizer(),
        device="cpu",
        dtype=dtype,
    )


@contextmanager
def padding(model: Any, side: str) -> Iterator[None]:
    """The tokenizer pads on that side inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.tokenizer, "padding_side", side)
        yield


def other_side(model: Any, positions: str) -> str:
    """A side to pad on, such that either of `tiny`, either side and any two positions meet."""
    return ("left", "right")[(positions in ("all", "continuation")) != (model.cfg.n_layers == 5)]


@pytest.fixture(scope="session", autouse=True)
def _no_hub() -> Iterator[None]:
    """What is not here is not asked for, again and again; a test may take this back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def llama() -> Any:
    return bridge(build_llama())


@pytest.fixture(scope="session")
def gpt2() -> Any:
    return bridge(build_gpt2())


@pytest.fixture(scope="session")
def double() -> Any:
    # GPT-2, as the Llama of transformers norms in float32 whatever its weights are.
    return bridge(build_gpt2().double(), dtype=torch.float64)


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def pairs() -> sl.ContrastivePairs:
    """Eight pairs of different lengths, so that batches hold padding."""
    openings = [
        "the river was",
        "how was the day today ? it went",
        "I said",
        "the soup is warm and the bread is very good and so",
        "you felt",
        "what a night it was by the river and the rain",
        "tomorrow the sun is",
        "it was so cold that the walk",
    ]
    return sl.ContrastivePairs.from_lists(
        [f"you are cheerful {opening}" for opening in openings],
        [f"you are very gloomy {opening}" for opening in openings],
    )


@pytest.fixture(scope="session")
def continued(pairs: sl.ContrastivePairs) -> sl.ContrastivePairs:
    """The same pairs with a continuation each."""
    words = ["warm and good", "so cold", "very bad soup", "rain", "a good day", "so", "kind", "by"]
    return sl.ContrastivePairs.from_lists(
        [p.positive for p in pairs], [p.negative for p in pairs], [f" {w}" for w in words]
    )


def sampled(model: Any, start: str, n_tokens: int, seed: int) -> str:
    """Text drawn from the model itself, as a trained model's prompts are text that it expects."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(tokenize_prompt(model, start).prompt)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logits[:4] = logits[len(model.tokenizer) :] = -math.inf  # words only
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return " ".join(model.tokenizer.convert_ids_to_tokens(ids[1:]))


@pytest.fixture(scope="session")
def many(llama: Any) -> sl.ContrastivePairs:
    """Twenty pairs."""
    positive = [sampled(llama, "you are cheerful", 8 + i % 5, seed=i) for i in range(20)]
    return sl.ContrastivePairs.from_lists(
        positive, [text.replace("cheerful", "very gloomy", 1) for text in positive]
    )


@pytest.fixture(scope="session")
def directions(llama: Any, many: sl.ContrastivePairs) -> sl.Directions:
    """Mean-difference directions of `many` at every block's output."""
    return sl.fit_directions(sl.collect_differences(llama, many))


@pytest.fixture(scope="session")
def bounded(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> Bounded:
    """`find_boundary` of `directions` on `many`."""
    return partial(sl.find_boundary, llama, many, directions)


@pytest.fixture(scope="session")
def study(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> Studies:
    """Studies of `directions` on `many`."""
    return partial(sl.Study, llama, many, directions)


@pytest.fixture(scope="module")
def much_padding() -> Iterator[None]:
    """Batches as large as asked for, however much padding that takes: so that it is put to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MAX_PADDING", 1.0)
        yield


@pytest.fixture(scope="session")
def real_model() -> Any:
    return sl.load_model()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """The tiny models are so small that a second thread only waits for the first."""
    is_real = request.node.get_closest_marker("real") is not None
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers) if is_real else 1)


@pytest.fixture(autouse=True)
def _hooks_are_gone(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the shared models have no hook left on them."""
    yield
    for name in ("llama", "gpt2", "loaded", "real_model"):
        if name in request.fixturenames:
            model = request.getfixturevalue(name)
            left = [n for n, point in model.hook_dict.items() if point.fwd_hooks]
            assert not left, f"hooks left on {name}: {left}"


# Commands


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_llama(n_layers=commands.N_LAYERS).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", commands.OPENINGS)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> commands.Main:
    """Run a command in this process."""
    from steerlens.cli import main

    def run_main(*arguments: str | Path) -> commands.Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert isinstance(stop.value.code, int)
        return commands.Outcome(stop.value.code, *capsys.readouterr())

    return run_main


@pytest.fixture(scope="session")
def sweep_words(model_folder: Path, pairs_file: Path) -> tuple[str, ...]:
    """`sweep` on the small model, without examples."""
    data = ("--model", str(model_folder), "--pairs", str(pairs_file))
    return ("sweep", *data, "--coefficients=-2,0,2", "--examples", "0")


@pytest.fixture
def sweep(run: commands.Main, sweep_words: tuple[str, ...]) -> commands.Main:
    """`steerlens sweep` on the small model; a later option overrides these."""
    return lambda *arguments: run(*sweep_words, *arguments)


@pytest.fixture(scope="session")
def swept_folder(sweep_words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a sweep, to be read or copied."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    commands.finish(*sweep_words, "--quiet", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def circuits_folder(
    model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of `steerlens circuits` on the small model, with its comparison; to be read."""
    folder = tmp_path_factory.mktemp("circuits") / "run"
    data = ("--model", model_folder, "--pairs", pairs_file, "--layer", "1", "--null", "2")
    commands.finish("circuits", *data, "--coefficient", "5", "--quiet", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Any:
    """The model of `model_folder` as `load_model` gives it: what workers can load too."""
    return sl.load_model(str(model_folder), device="cpu", progress=False)


@pytest.fixture
def loaded_once(loaded: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take the model of `model_folder` as `loaded`, where loading it is not the point."""
    load = sl.load_model

    def load_once(name: str | Path, **options: Any) -> Any:
        is_plain = str(name) == str(model_folder) and not options.get("template_args")
        is_plain &= options.get("dtype") == torch.float32
        is_plain &= (options.get("device"), options.get("revision")) == (None, None)
        return loaded if is_plain else load(name, **options)

    monkeypatch.setattr("steerlens.load_model", load_once)


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the neutral texts that ship."""
    monkeypatch.setattr("steerlens.measure.texts.neutral_texts", lambda: commands.NEUTRAL)
    # Of each half; words of a small tokenizer.
    monkeypatch.setattr("steerlens.measure.choosing.open_questions", lambda _: commands.OPENINGS)


@pytest.fixture(scope="session")
def fitted(loaded: Any, pairs: sl.ContrastivePairs) -> sl.Directions:
    """Mean-difference directions of `pairs` in it, at every block's output."""
    return sl.fit_directions(sl.collect_differences(loaded, pairs))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium (`browser.Browser`) for the tests of HTML pages."""
    # Here, for the examples in docstrings share this file, and stand beside no `browser`.
    from browser import open_browser

    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened
