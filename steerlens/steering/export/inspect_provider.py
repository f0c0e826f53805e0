"""Inspect's `steerlens/MODEL`: a steered model in its evaluations, and a sweep over coefficients.

Inspect loads this module by its entry point; nothing of steerlens imports it.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import Any

from anyio import to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr, value_to_float
from inspect_ai.solver import Generate, Solver, TaskState, solver

from steerlens.data.prompts import Message, Prompt
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.models.loading import load_model
from steerlens.progress import silent
from steerlens.steering import Coefficient, Generated, Positions
from steerlens.steering.export.gguf_file import read_vector
from steerlens.steering.generation import decoded, generate_texts

COEFFICIENT = "coefficient"
"""The part of a request's `extra_body` that takes the place of the model's own coefficient."""
SWEPT = "steerlens.sweep"
REFUSED = (
    *("top_p", "top_k", "stop_seqs", "best_of", "frequency_penalty", "presence_penalty"),
    *("logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "response_schema"),
)
"""Options of `GenerateConfig` that would change what is written, and that are not there."""


@dataclass(eq=False)
class Asked:
    """A request, and what was written for it: the texts, or the error."""

    prompt: TokenizedPrompt
    options: dict[str, Any]
    written: list[Generated] | Exception | None = None


@modelapi(name="steerlens")
class SteeredModel(ModelAPI):  # type: ignore[misc]
    """A model of `load_model` with a vector: `-M vector=FILE -M coefficient=4`.

    Greedy, or with temperature 1 and a seed the model's own distribution. Greedy calls that wait
    for each other run in one batch.

    Args:
        model_name: as of `load_model`, after `steerlens/`.
        vector: of a .safetensors or .gguf file; by default none, and coefficient 0.
        coefficient: as in `Coefficient`; by default 0, the model as it is.
        positions: which tokens are steered (see `Positions`).
        raw: the messages' texts, without a chat template round them.
        load: other arguments of `load_model`.

    Raises:
        InputError: there is no vector for the coefficient, or the file cannot be read; of a
            request: it has tools, other content than text, or options that are not there.
        ModelError: as `load_model`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (a value)
        *,
        vector: str | None = None,
        coefficient: Coefficient = 0,
        positions: Positions = "all",
        raw: bool = False,
        **load: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.model = load_model(model_name, **load)
        self.vector: Any = {}
        if vector is not None:
            self.vector = read_vector(vector)
            self.vector.check_model(self.model)
        self._check_vector(coefficient)
        self.coefficient, self.positions, self.raw = coefficient, positions, raw
        self._waiting: list[Asked] = []
        self._one_at_a_time = Lock()

    def max_tokens(self) -> int:
        """Of a request that says nothing."""
        return 256

    def max_connections(self) -> int:
        """The most calls that can wait for each other."""
        return 32

    async def generate(
        self,
        input: list[ChatMessage],
        tools: Sequence[Any],
        tool_choice: Any,  # noqa: ARG002 (there are no tools)
        config: Any,
    ) -> ModelOutput:
        """What the steered model writes after the messages."""
        if tools:
            raise InputError("a steered model has no tools")
        asked = Asked(tokenize_prompt(self.model, self._prompt(input)), self._options(config))
        self._waiting.append(asked)
        written = await to_thread.run_sync(self._write, asked)
        n_read, n_written = len(asked.prompt.prompt), sum(len(text.ids) for text in written)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(
                        content=decoded(self.model, text.ids),
                        model=self.model_name,
                        source="generate",
                    ),
                    stop_reason="stop" if text.ended else "max_tokens",
                )
                for text in written
            ],
            usage=ModelUsage(
                input_tokens=n_read, output_tokens=n_written, total_tokens=n_read + n_written
            ),
            metadata={COEFFICIENT: asked.options["coefficients"][0]},
        )

    def _check_vector(self, coefficient: Coefficient) -> None:
        if coefficient != 0 and not self.vector:
            raise InputError(f"coefficient {coefficient!r} without a vector; give -M vector=FILE")

    def _prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The messages as a chat, or as text."""
        for said in messages:
            parts = [] if isinstance(said.content, str) else said.content
            kinds = {part.type for part in parts} - {"text"}
            if kinds or said.role == "tool":
                raise InputError(
                    f"expected messages of text, got {', '.join(sorted(kinds)) or 'a tool'}"
                )
        if self.raw:
            return "\n\n".join(said.text for said in messages)
        return tuple(Message(said.role, said.text) for said in messages)

    def _options(self, config: Any) -> dict[str, Any]:
        """What `generate_texts` is told. Raises `InputError` of what it cannot do."""
        if refused := [name for name in REFUSED if getattr(config, name) is not None]:
            raise InputError(f"a steered model cannot do {', '.join(refused)}")
        told = dict(config.extra_body or {})
        coefficient = told.pop(COEFFICIENT, self.coefficient)
        if told:
            raise InputError(f"extra_body has {', '.join(told)}; it may have {COEFFICIENT} alone")
        self._check_vector(coefficient)
        seed = config.seed if config.temperature == 1 else None
        if config.temperature not in (None, 0, 1) or (config.temperature == 1 and seed is None):
            raise InputError(
                f"temperature is 0 (greedy) or 1 with a seed (the model's own distribution), not "
                f"{config.temperature} with seed {config.seed}"
            )
        return {
            "coefficients": [coefficient],
            "max_new_tokens": config.max_tokens or self.max_tokens(),
            "samples": config.num_choices or 1,
            "seed": seed,
        }

    def _write(self, asked: Asked) -> list[Generated]:
        """The texts of a request, and with it of all greedy ones like it that wait."""
        with self._one_at_a_time:
            if asked.written is None:
                alike = [one for one in list(self._waiting) if one.options == asked.options]
                # A seed draws by the place in the batch, which is chance here.
                batch = alike if asked.options["seed"] is None else [asked]
                for one in batch:
                    self._waiting.remove(one)
                self._write_batch(batch)
        if isinstance(asked.written, Exception):
            raise asked.written
        assert asked.written is not None
        return asked.written

    def _write_batch(self, batch: Sequence[Asked]) -> None:
        prompts, options = [one.prompt for one in batch], batch[0].options
        try:
            texts = generate_texts(
                *(self.model, prompts, self.vector),
                positions=self.positions,
                progress=silent,
                **options,
            )
        except Exception as error:
            if len(batch) == 1:
                batch[0].written = error
            else:  # whose request it is, is told so
                for one in batch:
                    self._write_batch([one])
            return
        for place, one in enumerate(batch):
            one.written = [text for text in texts if text.prompt == place]


@solver  # type: ignore[untyped-decorator]
def sweep_coefficients(coefficients: Sequence[Coefficient]) -> Solver:
    """Generate at each coefficient; the state goes on with the first one's output.

    Args:
        coefficients: each as in `Coefficient`; score them with `at_each_coefficient`.

    Raises:
        InputError: none, or one twice.
    """
    if not coefficients or len({*map(str, coefficients)}) < len(coefficients):
        raise InputError(f"expected one or more different coefficients, got {coefficients!r}")

    async def solve(state: TaskState, _: Generate) -> TaskState:
        outputs = {}
        for coefficient in coefficients:
            config = GenerateConfig(extra_body={COEFFICIENT: coefficient})
            outputs[str(coefficient)] = await get_model().generate(state.messages, config=config)
        state.store.set(SWEPT, {name: out.model_dump() for name, out in outputs.items()})
        state.output = next(iter(outputs.values()))
        state.messages.append(state.output.message)
        return state

    return solve


@scorer(metrics={"*": [mean(), stderr()]})  # type: ignore[untyped-decorator]
def at_each_coefficient(scorer: Scorer) -> Scorer:
    """The score of each output of `sweep_coefficients`, as a metric of its coefficient's name."""
    number = value_to_float()

    async def score(state: TaskState, target: Target) -> Score:
        values = {}
        for name, output in state.store.get(SWEPT, {}).items():
            one = copy(state)
            one.output = ModelOutput.model_validate(output)
            one.messages = [*state.messages[:-1], one.output.message]
            values[name] = number((await scorer(one, target)).value)
        return Score(value=values)

    return score
