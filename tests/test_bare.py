"""Hugging Face's own blocks in place of the Bridge's: the same numbers, and found out where not."""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama, needs_bridge
from zoo import bridged

import steerlens as sl
from steerlens.engine import backend as bare
from steerlens.engine import backward as rows
from steerlens.engine import compiled
from steerlens.engine import plan as engine
from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import join
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.models.hooked_model import hugging_face_model
from steerlens.models.hooks import resid_post

pytestmark = needs_bridge

HOOKS = [resid_post(0), resid_post(2)]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The bare model where it would not be taken: the CPU stands for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bare, "DEVICES", {"cpu"})
        yield


@pytest.fixture(scope="module")
def texts() -> sl.ContrastivePairs:
    openings = ["the river was", "how was the day today ? it went by", "I said it is very good and"]
    return sl.ContrastivePairs.from_lists(
        [f"you are cheerful {text}" for text in openings],
        [f"you are very gloomy {text}" for text in openings],
        [" warm and good", " so cold", " rain"],
    )


def numbers(model: Any, pairs: sl.ContrastivePairs, positions: Any = "all") -> dict[str, Any]:
    """Everything that may take the bare model: differences, gradients, a sweep, a prediction."""
    differences = sl.collect_differences(model, pairs)
    directions = sl.fit_directions(differences)
    options: dict[str, Any] = {"layers": [0, -1], "steered_positions": positions}
    swept = sl.sweep(model, pairs, directions, coefficients=[-2, 0, 3], n_bootstrap=2, **options)
    gradients = sl.loss_gradients(model, pairs, position=-1)
    expected = sl.Study(model, pairs, directions, seed=0, **options).predicted_boundary()
    return {
        "differences": differences.values,
        "sweep": torch.tensor(swept.table[["projection", "logprob_nats", "loss"]].to_numpy()),
        "separation": gradients.separation_positive,
        "coherence": gradients.coherence,
        "expected": torch.tensor(expected.predicted_boundary_pos.to_numpy()),
    }


@pytest.mark.parametrize(
    ("kind", "side", "positions"),
    [
        *((kind, "right", "all") for kind in ("Llama", "GPT-2", "BLOOM", "Mixtral")),
        *((kind, "left", "last") for kind in ("Llama", "GPT-2", "GPT-NeoX", "Qwen3")),
        *((kind, "left", "last") for kind in ("Gemma 2", "BLOOM", "OPT", "Mixtral")),
    ],
)
def test_numbers_are_those_of_the_bridge(
    kind: str,
    side: str,
    positions: str,
    texts: sl.ContrastivePairs,
    monkeypatch: pytest.MonkeyPatch,
    much_padding: None,
) -> None:
    model = bridged(kind)
    model.tokenizer.padding_side = side
    expected = numbers(model, texts, positions)
    assert for_hooks(model, HOOKS) is model
    monkeypatch.setattr(bare, "DEVICES", {"cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(group|were fitted on)")
        found = numbers(model, texts, positions)
    assert isinstance(for_hooks(model, HOOKS), BareModel)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.usefixtures("on_cpu")
def test_a_cost_does_not_depend_on_what_was_run_before(texts: sl.ContrastivePairs) -> None:
    model = bridge(build_llama())
    costs = [sl.loss_gradients(model, texts, position=-1).forward_equivalents for _ in range(2)]
    assert costs[0] == costs[1] > 4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "options",
    [{}, {"layers": [0, 2], "loss_hook": "blocks.3.hook_resid_post"}, {"per_layer": True}],
)
@pytest.mark.usefixtures("on_cpu")
def test_both_sides_in_one_pass_have_the_gradients_of_two(
    texts: sl.ContrastivePairs, side: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge(build_llama())
    model.tokenizer.padding_side = side
    found = {}
    for bound in (0, math.inf):
        monkeypatch.setattr(rows, "LAUNCH_BOUND", bound)
        joined: list[Any] = []
        monkeypatch.setattr(rows, "join", lambda *args, j=joined: j.append(args) or join(*args))
        found[bound] = sl.loss_gradients(model, texts, position=-1, **options)
        assert bool(joined) == (bound > 0)
    for name in ("separation_positive", "separation_negative", "coherence", "logprob"):
        values = getattr(found[0], name)
        assert bool((values != 0).any())
        torch.testing.assert_close(getattr(found[math.inf], name), values, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
def test_it_runs_in_place_of_the_bridge(
    texts: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Bridge is silent once the bare model is known: in extraction, sweep and gradients."""
    model = bridge(build_llama())
    for_hooks(model, HOOKS)
    directions = sl.fit_directions(sl.collect_differences(model, texts))
    fired: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (fired.append(1), forward(*a, **k))[1])
    numbers(model, texts)
    assert not fired
    # Control: a hook inside a block is not one of its hooks.
    sl.collect_differences(model, texts, layers="blocks.1.hook_mlp_out")
    assert fired
    assert len(directions.hook_names) == 5


@pytest.mark.usefixtures("on_cpu")
def test_blocks_run_alone_once_their_arguments_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = sl.ContrastivePairs.from_lists(
        ["you are kind and good", "it was so warm and"],
        ["you are rude and bad", "it was so cold and"],
    )
    options: dict[str, Any] = {"layers": [0, 2], "coefficients": [-2, 3], "n_bootstrap": 2}
    tables, passes = [], []
    forward = BareModel.forward
    monkeypatch.setattr(
        BareModel,
        "forward",
        lambda *args, **kwargs: (passes.append(1), forward(*args, **kwargs))[1],
    )
    n_passes = []
    for alone in (True, False):
        model = bridge(build_llama())
        runner = for_hooks(model, HOOKS)
        assert runner.can_resume
        runner.can_resume = alone
        directions = sl.fit_directions(sl.collect_differences(model, pairs))
        passes.clear()
        tables.append(sl.sweep(model, pairs, directions, **options).table)
        n_passes.append(len(passes))
    assert n_passes[0] < n_passes[1]
    for column in ("projection", "logprob_nats"):
        assert tables[0][column].tolist() == tables[1][column].tolist()


@pytest.mark.usefixtures("on_cpu")
def test_a_block_alone_that_is_wrong_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = BareModel.resume
    monkeypatch.setattr(BareModel, "resume", lambda self, x, *rest: resume(self, x * 1.5, *rest))
    assert not for_hooks(bridge(build_llama()), HOOKS).can_resume
    monkeypatch.undo()
    monkeypatch.setattr(bare, "DEVICES", {"cpu"})
    assert for_hooks(bridge(build_llama()), HOOKS).can_resume


@pytest.mark.parametrize(
    ("value", "is_shared"),
    [
        (None, True),
        (torch.tensor(3.0), True),
        (torch.zeros(1, 5, 8), True),
        (torch.zeros(5), True),
        (torch.zeros(3), False),  # one a row, maybe
        (torch.zeros(3, 5, 8), False),
        (torch.zeros(5, 8), False),
        ((torch.zeros(1, 5), {"mask": None, "scale": 0.5}), True),
        ((torch.zeros(1, 5), {"mask": torch.zeros(3, 1, 5, 5)}), False),
        (object(), False),
    ],
)
def test_what_is_the_same_for_all_rows(value: Any, is_shared: bool) -> None:
    assert bare._is_shared(value, 3) is is_shared


@pytest.mark.usefixtures("on_cpu")
def test_where_it_is_not_taken(texts: sl.ContrastivePairs) -> None:
    model = bridge(build_llama())
    assert isinstance(for_hooks(model, HOOKS), BareModel)
    assert for_hooks(model, [*HOOKS, "blocks.1.hook_mlp_out"]) is model
    model.add_hook(resid_post(1), lambda activation, hook: activation * 1.3)
    assert for_hooks(model, HOOKS) is model
    model.reset_hooks()
    assert for_hooks(model, HOOKS) is for_hooks(model, HOOKS)
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    assert for_hooks(model, HOOKS) is model
    handle.remove()
    assert isinstance(for_hooks(model, HOOKS), BareModel)


@pytest.mark.usefixtures("on_cpu")
def test_other_weights_are_noticed() -> None:
    model = bridge(build_llama())
    one = for_hooks(model, HOOKS)
    model.original_model.double()
    model.cfg.dtype = torch.float64
    other = for_hooks(model, HOOKS)
    assert other is not one
    assert {weight.dtype for weight in other.original_model.parameters()} == {torch.float64}
    assert for_hooks(model, HOOKS) is other


@pytest.mark.usefixtures("on_cpu")
def test_blocks_that_differ_are_found_out(
    texts: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bare.verification.own_model
    expected = sl.collect_differences(bridge(build_llama()), texts)

    def broken(model: Any) -> Any:
        plain = own(model)
        plain.model.layers[3].mlp.register_forward_hook(lambda module, args, output: output * 1.1)
        return plain

    monkeypatch.setattr(bare.verification, "own_model", broken)
    model = bridge(build_llama())
    with pytest.warns(RuntimeWarning, match=r"do not stand in for the Bridge's \(blocks\.3"):
        differences = sl.collect_differences(model, texts)
    assert for_hooks(model, HOOKS) is model  # and not tried again: warnings are errors
    torch.testing.assert_close(differences.values, expected.values, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_blocks_that_cannot_be_resumed_are_found_out(texts: sl.ContrastivePairs) -> None:
    """Whole passes are right, so they are taken for extraction; a plan goes back to the Bridge."""
    model = bridge(build_llama())
    runner = for_hooks(model, HOOKS)
    seen: list[torch.Tensor] = []
    runner.blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    runner.blocks[4].mlp.register_forward_hook(
        lambda m, a, out: out if seen and seen.pop().shape == out.shape else out * 2
    )
    directions = sl.fit_directions(sl.collect_differences(model, texts))
    with pytest.warns(RuntimeWarning, match="blocks cannot be resumed after blocks.1"):
        found = sl.sweep(model, texts, directions, layers=[1], coefficients=[2], n_bootstrap=2)
    honest = bridge(build_llama())
    expected = sl.sweep(honest, texts, directions, layers=[1], coefficients=[2], n_bootstrap=2)
    assert found.table.logprob_nats[0] == pytest.approx(expected.table.logprob_nats[0], abs=1e-5)


# Compiled blocks


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every plan compiles, and what stands for PyTorch's compiler counts its calls."""
    calls: list[Any] = []

    def compile_(forward: Any, *, dynamic: bool) -> Any:
        assert dynamic

        def run(block: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(block)
            return forward(block, *args, **kwargs)

        return run

    monkeypatch.setattr(compiled.torch, "compile", compile_)
    monkeypatch.setattr(engine, "COMPILE_FROM", 0.0)
    return calls


@pytest.mark.usefixtures("on_cpu")
def test_compiled_blocks_run_and_give_the_same(
    texts: sl.ContrastivePairs, compiling: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge(build_llama())
    found = numbers(model, texts)
    runner = for_hooks(model, HOOKS)
    assert len(set(map(id, compiling))) == 5
    assert set(map(id, compiling)) <= set(map(id, runner.blocks))
    monkeypatch.setattr(engine, "COMPILE_FROM", 1e30)
    n_calls = len(compiling)
    expected = numbers(bridge(build_llama()), texts)
    assert len(compiling) == n_calls
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.usefixtures("on_cpu", "compiling")
@pytest.mark.parametrize("fault", ["differs", "raises"])
def test_a_compiled_block_that_is_wrong_is_given_up(
    fault: str, texts: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(forward: Any, **options: Any) -> Any:
        def run(block: Any, *args: Any, **kwargs: Any) -> Any:
            if fault == "raises":
                raise ValueError("no compiler here\nand more")
            return forward(block, *args, **kwargs) * 1.01

        return run

    monkeypatch.setattr(compiled.torch, "compile", wrong)
    model = bridge(build_llama())
    reason = "ValueError: no compiler here" if fault == "raises" else "differs by 0.01"
    with pytest.warns(RuntimeWarning, match=rf"compiled blocks are given up \({reason}\)"):
        found = numbers(model, texts)
    monkeypatch.setattr(engine, "COMPILE_FROM", 1e30)
    expected = numbers(bridge(build_llama()), texts)
    torch.testing.assert_close(found["sweep"], expected["sweep"], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cpu", "compiling")
def test_memory_that_is_out_is_not_taken_for_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled.torch, "compile", lambda forward, **options: full)
    runner = for_hooks(bridge(build_llama()), HOOKS)
    runner.compile_blocks()
    tokens = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        runner(tokens)
    runner(tokens)  # with gradients, which are not compiled


@pytest.mark.usefixtures("on_cpu")
def test_a_forward_that_is_replaced_is_found_out() -> None:
    model = bridge(build_llama())
    assert isinstance(for_hooks(model, HOOKS), BareModel)
    assert for_hooks(model, HOOKS) is for_hooks(model, HOOKS)
    model.blocks[1].mlp.forward = lambda hidden_states, *args, **options: 0 * hidden_states
    with pytest.warns(RuntimeWarning, match="do not stand in for the Bridge's"):
        assert for_hooks(model, HOOKS) is model


@pytest.mark.usefixtures("on_cpu")
def test_parts_on_several_devices_are_run_bare_too(texts: sl.ContrastivePairs) -> None:
    """Here "cpu" and "cpu:0" stand for two devices; a block moves what it is given."""
    model = bridge(build_llama())
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{i}" for i in range(len(model.blocks))]
    device_map = dict.fromkeys(parts + layers, "cpu") | {layers[1]: "cpu:0"}
    hugging_face_model(model).hf_device_map = device_map
    runner = for_hooks(model, HOOKS)
    assert isinstance(runner, BareModel)
    moved_to = [block._hf_hook.execution_device for block in runner.blocks]
    assert moved_to == [device_map[layer] for layer in layers]
    runner.compile_blocks()
    assert runner.compiled is None  # compiled ones would not move what they are given
    expected = numbers(bridge(build_llama()), texts)
    for name, values in numbers(model, texts).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_pairs_of_a_pass_with_its_graph(texts: sl.ContrastivePairs) -> None:
    """Alike passes, of as many tokens as a GPU needs; a Bridge has no such number of its own."""
    model = bridge(build_llama())
    pairs = rows.TokenizedPairs(*(tokenize_pairs(model, texts).positive * 4,) * 2)  # 12 pairs
    width = max(map(len, pairs.positive))
    assert rows.pairs_per_pass(model, pairs) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bare, "DEVICES", {"cpu"})
        runner = for_hooks(model, HOOKS)
    for n_tokens, expected in ((5 * width, 4), (100 * width, 12), (1, 1)):  # 3, 1 and 12 passes
        runner.block_operations = rows.GRAPH_OPERATIONS / n_tokens
        assert rows.pairs_per_pass(runner, pairs) == expected


def gap(found: torch.Tensor, exact: torch.Tensor) -> float:
    """How far logits are from the exact ones, relative to these."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_fused_where_that_gives_the_same(dtype: torch.dtype) -> None:
    """Of a Llama all five blocks' two and the last; in Gemma's the weight is one more, so none."""
    torch.manual_seed(1)
    plain = build_llama().to(dtype).requires_grad_(False)
    norms = [m for m in plain.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.weight.copy_(1 + 0.1 * torch.randn_like(norm.weight))
    ids = torch.arange(12).reshape(2, 6)
    exact = copy.deepcopy(plain).double()(ids).logits
    before = gap(plain(ids).logits, exact)
    assert bare.fuse_norms(plain) == len(norms) == 11
    assert gap(plain(ids).logits, exact) < 1.2 * before < 0.1  # the rounding, which is no larger
    norms[0].weight.mul_(3)  # of the weight as it is then
    assert gap(plain(ids).logits, exact) > 0.2

    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    class HalvedRMSNorm(type(norms[0])):  # type: ignore[misc]  # what such a class might do
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) / 2

    class OuterRMSNorm(type(norms[0])):  # type: ignore[misc]  # eps beside the root, not in it
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            root = hidden_states.float().square().mean(dim=-1, keepdim=True).sqrt()
            scaled = hidden_states / (root + self.variance_epsilon)
            return self.weight * scaled.to(hidden_states.dtype)

    class GatedRMSNorm(type(norms[0])):  # type: ignore[misc]  # as Qwen3-Next has it
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * gate.sigmoid()

    class FreelyGatedRMSNorm(type(norms[0])):  # type: ignore[misc]  # as Mamba 2 has it
        def forward(
            self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
        ) -> torch.Tensor:
            return super().forward(hidden_states) * (1 if gate is None else gate.sigmoid())

    kinds = (GemmaRMSNorm, HalvedRMSNorm, OuterRMSNorm, GatedRMSNorm, FreelyGatedRMSNorm)
    others = torch.nn.ModuleList([*(kind(8) for kind in kinds), torch.nn.LayerNorm(8)])
    assert bare.fuse_norms(others.to(dtype)) == 0
