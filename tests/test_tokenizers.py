"""Tokenizers that lack something, text of any script, and prompts as long as the context."""

import atexit
import shutil
import tempfile
from typing import Any

import pytest
import torch
import transformers
from conftest import bridge, build_gpt2, build_llama, build_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

import steerlens as sl
from steerlens.errors import InputError, ModelError
from steerlens.measure.tokens import token_damage
from steerlens.steering import generate_tokens

N_CTX = 64
SCRIPTS = [
    "\u0645\u0631\u062d\u0628\u0627 \u064a\u0627",  # Arabic, from right to left
    "\u05e9\u05dc\u05d5\u05dd \u05dc\u05da",  # Hebrew, from right to left
    "\u4f60\u597d\u554a",  # Chinese
    "na\u00efve \U0001f600",  # an accent, and a character of four bytes
]
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<s>[{{ m.role }}] {{ m.content }} {% endfor %}"
)


def byte_tokenizer() -> Any:
    """One token a letter of a few, and bytes for everything else, as SentencePiece falls back."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    vocab += [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokenizer = Tokenizer(
        kinds.BPE({token: i for i, token in enumerate(vocab)}, [], unk_token="<unk>")
    )
    tokenizer.model.byte_fallback = True
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return saved(tokenizer)


def saved(tokenizer: Tokenizer) -> Any:
    """From a folder, which TransformerLens loads it from once more."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    folder = tempfile.mkdtemp(prefix="steerlens-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_model() -> Any:
    hf_model = build_llama(n_layers=3)
    hf_model.resize_token_embeddings(320)
    return bridge(hf_model, byte_tokenizer())


# What a tokenizer lacks


@pytest.mark.parametrize("missing", ["bos_token", "pad_token"])
def test_the_same_ids_give_the_same_numbers_without_it(
    missing: str, pairs: sl.ContrastivePairs
) -> None:
    """The pad token's id is never looked at; without BOS the first token is another."""
    model = bridge(build_gpt2(), build_tokenizer(**{missing: None}))
    whole = bridge(build_gpt2())
    found, expected = (sl.collect_differences(one, pairs, batch_size=8) for one in (model, whole))
    is_same = torch.allclose(found.positive, expected.positive, atol=1e-5)
    assert is_same is (missing == "pad_token")
    assert found.positive.isfinite().all()


def test_a_template_without_a_system_turn_says_what_to_do() -> None:
    model = bridge(build_gpt2(), build_tokenizer(chat_template=NO_SYSTEM))
    system = [{"role": "system", "content": "kind"}, {"role": "user", "content": "how was it"}]
    user = [{"role": "user", "content": "kind how was it"}]
    with pytest.raises(InputError, match=r"not supported; if it takes no system turn, write that"):
        sl.engine.tokenize_prompt(model, _messages(system))
    assert len(sl.engine.tokenize_prompt(model, _messages(user)).prompt) > 3


def _messages(turns: list[dict[str, str]]) -> tuple[sl.Message, ...]:
    return tuple(sl.Message(**turn) for turn in turns)


def with_pad_beyond(hf_model: Any) -> Any:
    """`[PAD]` added to the tokenizer, and the embeddings not resized: a common fault."""
    hf_model.resize_token_embeddings(len(build_tokenizer(pad_token=None)))
    tokenizer = build_tokenizer(pad_token="[PAD]")
    assert tokenizer.pad_token_id == hf_model.config.vocab_size
    return bridge(hf_model, tokenizer)


@pytest.mark.usefixtures("much_padding")
def test_a_pad_token_beyond_the_vocabulary_changes_nothing(pairs: sl.ContrastivePairs) -> None:
    model, whole = with_pad_beyond(build_gpt2()), bridge(build_gpt2())
    found, expected = (sl.collect_differences(one, pairs, batch_size=8) for one in (model, whole))
    torch.testing.assert_close(found.positive, expected.positive, rtol=1e-4, atol=1e-5)
    prompts = [sl.engine.tokenize_prompt(model, text) for text in ("you are kind so", "I am")]
    vector = {"blocks.1.hook_resid_post": torch.eye(32)[0]}
    together = generate_tokens(model, prompts, vector, 1.0, max_new_tokens=3)
    assert together == [
        generate_tokens(model, [one], vector, 1.0, max_new_tokens=3)[0] for one in prompts
    ]


def test_a_token_that_the_model_has_not_is_named_with_its_vocabulary() -> None:
    model = with_pad_beyond(build_gpt2())
    n_tokens = model.cfg.d_vocab
    with pytest.raises(
        ModelError, match=rf"id {n_tokens} \(as '\[PAD\]'\).* ends at {n_tokens - 1}"
    ):
        sl.engine.tokenize_prompt(model, "you are [PAD] kind")
    assert sl.engine.tokenize_prompt(model, "you are kind").prompt


def sentence_piece() -> Any:
    """A tokenizer that puts "\u2581" before every text that it is given, as Llama 2's does."""
    vocab = ["<unk>", "<s>", "</s>", "\u2581", *"abkno", "ok", "\u2581ok", "nok"]
    tokenizer = Tokenizer(
        kinds.BPE(
            {token: i for i, token in enumerate(vocab)},
            [("o", "k"), ("\u2581", "ok"), ("n", "ok")],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return saved(tokenizer)


def llama_2() -> Any:
    """The same by a normalizer, with bytes for what it has not."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abkno"]
    merges = [("o", "k"), ("\u2581", "ok"), ("n", "ok"), ("b", "b")]
    vocab += ["".join(pair) for pair in merges]
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(kinds.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return saved(tokenizer)


def byte_level() -> Any:
    """As GPT-2's: a space belongs to the word after it, and bytes are letters."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["an ok bank ok ok nok b(ok"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return saved(tokenizer)


TOKENIZERS = {
    "sentence_piece": sentence_piece,
    "llama_2": llama_2,
    "byte_level": byte_level,
    "byte_fallback": lambda: byte_tokenizer(),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def cutting(request: pytest.FixtureRequest) -> Any:
    return with_tokenizer(request.param)


def with_tokenizer(kind: str) -> Any:
    """A model with that kind of tokenizer."""
    hf_model = build_llama(n_layers=3)
    hf_model.resize_token_embeddings(320)
    return bridge(hf_model, TOKENIZERS[kind]())


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("an", " ok"),
        ("a", "b"),
        ("a", "ok"),  # alone it would be "\u2581ok", another word
        ("ok ok", " na\u00efve \U0001f600 ok"),
        ("ok \u4f60", "\u597d ok"),
    ],
)
def test_a_continuation_is_what_it_is_in_the_whole_text(
    cutting: Any, prompt: str, continuation: str
) -> None:
    """The oracle: the whole text tokenised once and run by Hugging Face's own model."""
    found = sl.engine.tokenize_prompt(cutting, prompt, continuation)
    tokenizer, bos = cutting.tokenizer, cutting.tokenizer.bos_token_id
    whole = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    assert found.ids == (bos, *whole)
    assert found.prompt == sl.engine.tokenize_prompt(cutting, prompt).prompt
    if tokenizer.unk_token_id not in whole:
        assert tokenizer.decode(found.continuation).strip() == continuation.strip()
    pairs = sl.ContrastivePairs.from_lists([prompt] * 2, ["b", "bo"], [continuation] * 2)
    directions = {"blocks.1.hook_resid_post": torch.eye(32)[0]}
    measured = sl.Study(cutting, pairs, sl.SteeringVector.from_vectors(directions)).baseline
    hugging_face = getattr(cutting, "original_model", None)
    if hugging_face is not None:
        with torch.no_grad():
            logprobs = hugging_face(torch.tensor([[bos, *whole]])).logits[0].log_softmax(dim=-1)
        of_tokens = logprobs[range(len(whole)), whole][-len(found.continuation) :]
        torch.testing.assert_close(measured.logprob, of_tokens.mean().expand(2))


@pytest.mark.parametrize(
    ("kind", "prompt", "continuation", "straddling", "prompt_back"),
    [
        ("sentence_piece", "an", "ok", "nok", "a"),
        ("llama_2", "an", "ok", "nok", "a"),
        ("llama_2", "a ", "ok", "\u2581ok", "a"),  # as with a space at the end of a prompt
        ("byte_level", "an ", "ok", "\u0120ok", "an"),
    ],
)
def test_a_token_on_both_sides_of_the_cut(
    kind: str, prompt: str, continuation: str, straddling: str, prompt_back: str
) -> None:
    """An error that shows it, or by choice the first token of the continuation."""
    model = with_tokenizer(kind)
    items = sl.PreferenceItems(
        tuple(sl.PreferenceItem(prompt, continuation, "b", id=i) for i in "xy")
    )
    pairs = sl.ContrastivePairs.from_lists(
        [prompt] * 2, ["b" + prompt] * 2, [continuation, continuation * 2]
    )
    message = f"{continuation!r} cannot be cut off from the .*one token, '{straddling}' .* becomes"
    for tokenize, given in (
        (sl.engine.tokenize_items, items),
        (sl.engine.tokenize_pairs, pairs),
    ):
        with pytest.raises(InputError, match=message):
            tokenize(model, given)
    sl.data.set_rendering(model.tokenizer, straddle="back")
    assert sl.models.provenance(model).rendering == '{"straddle": "back"}'
    sides = sl.engine.tokenize_items(model, items)
    whole = model.tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    names = model.tokenizer.convert_ids_to_tokens
    for side, text in zip(sides, (continuation, "b"), strict=True):
        assert side[0].prompt == sl.engine.tokenize_prompt(model, prompt_back).prompt
        assert model.tokenizer.decode(side[0].ids[1:]).strip() == prompt + text
    assert [*sides[0][0].ids[1:]] == whole
    assert names(sides[0][0].continuation[0]) == straddling
    tokenized = sl.engine.tokenize_pairs(model, pairs)
    assert tokenized.positive[0].ids == sides[0][0].ids
    # Both sides are read before the same continuation.
    assert tokenized.negative[0].prompt == (
        sl.engine.tokenize_prompt(model, "b" + prompt_back).prompt
    )
    assert tokenized.negative[0].continuation == ()


# Text of any script


@pytest.mark.parametrize("text", SCRIPTS)
def test_any_script_comes_back_from_bytes(byte_model: Any, text: str) -> None:
    tokenized = sl.engine.tokenize_prompt(byte_model, text, text)
    assert byte_model.tokenizer.decode(tokenized.continuation) == text
    unknown = byte_model.tokenizer.unk_token_id
    assert unknown not in tokenized.prompt


def test_pairs_and_tokens_of_any_script(byte_model: Any) -> None:
    pairs = sl.ContrastivePairs.from_lists(
        [f"good {text}" for text in SCRIPTS], [f"bad {text}" for text in SCRIPTS]
    )
    directions = sl.fit_directions(sl.collect_differences(byte_model, pairs))
    assert (
        sl.sweep(byte_model, pairs, directions, coefficients=[0, 1], n_bootstrap=2)
        .table.logprob_nats.notna()
        .all()
    )
    table = token_damage(byte_model, pairs, directions, layer=1, coefficients=[1])
    first = table[(table["side"] == "positive") & (table["prompt"] == "1")]
    assert "\ufffd" in "".join(first["token"])  # a part of a character
    assert "good" in "".join(first["token"])


# The context to its last token


@pytest.mark.parametrize("n_after", [0, 3])
def test_a_full_context_is_measured_and_one_token_more_is_not(llama: Any, n_after: int) -> None:
    after = [" so" * n_after] * 2 if n_after else None
    for more in (0, 1):
        words = ["very"] * (N_CTX - 2 - n_after + more)
        pairs = sl.ContrastivePairs.from_lists(
            [" ".join([*words, word]) for word in ("kind", "good")],
            [" ".join([*words[: -1 - more], word]) for word in ("rude", "bad")],
            after,
        )
        if more:
            with pytest.raises(InputError, match=f"has {N_CTX + 1} tokens .* context is {N_CTX}"):
                sl.collect_differences(llama, pairs)
            continue
        directions = sl.fit_directions(sl.collect_differences(llama, pairs))
        swept = sl.sweep(llama, pairs, directions, coefficients=[0, 2], n_bootstrap=2)
        assert swept.table.logprob_nats.notna().all()
        found = sl.find_boundary(llama, pairs, directions, layers=[2], budget="kl=0.1")
        assert (found.layers.boundary_pos > 0).all()


def test_generation_fills_the_context_and_no_more(llama: Any) -> None:
    prompt = sl.engine.tokenize_prompt(llama, " ".join(["very"] * (N_CTX - 5)))
    unit = torch.nn.functional.normalize(torch.arange(1.0, 33.0), dim=0)
    vector = {"blocks.1.hook_resid_post": unit}
    assert len(prompt) == N_CTX - 4
    (generated,) = generate_tokens(llama, [prompt], vector, 1.0, max_new_tokens=4)
    assert len(generated) <= 4
    with pytest.raises(InputError, match=r"5 new tokens after a prompt of 60 do not fit"):
        generate_tokens(llama, [prompt], vector, 1.0, max_new_tokens=5)
    with pytest.raises(InputError, match="1 or more new tokens, got 0 and 4"):
        generate_tokens(llama, [], vector, 1.0, max_new_tokens=4)
