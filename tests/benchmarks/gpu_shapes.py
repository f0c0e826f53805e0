"""Random-init models of real shapes, work of an exact size for them, and its arithmetic."""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from work import hooked

import steerlens as sl
from steerlens.engine.batches import Batch, make_batches
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import Job, Workload
from steerlens.loss import label_logprob
from steerlens.models.hooks import hook_layer, readout_hook, resid_post

WORDS = [f"word{i}" for i in range(200)]
Shape = tuple[Any, dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "Llama 7B": (
        transformers.LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "Qwen3 0.6B": (
        transformers.Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM2 135M": (
        transformers.LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "Llama 70B, 8 blocks": (
        transformers.LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 8,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


def build(name: str, *, device: str, dtype: torch.dtype, tiny: bool = False, seed: int = 0) -> Any:
    """A `TransformerBridge` of that shape, its weights made on the device; `tiny` for a trial."""
    from transformer_lens.model_bridge import TransformerBridge

    model = _made(name, device=device, dtype=dtype, tiny=tiny, seed=seed)
    return TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=_tokenizer(), device=device, dtype=dtype
    )


def save(name: str, folder: Path, *, device: str, tiny: bool = False, seed: int = 0) -> None:
    """Write a model of that shape in bfloat16, as a checkpoint of Hugging Face's, to a folder."""
    model = _made(name, device=device, dtype=torch.bfloat16, tiny=tiny, seed=seed)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _made(name: str, *, device: str, dtype: torch.dtype, tiny: bool, seed: int) -> Any:
    kind, settings = SHAPES[name]
    sizes = {**settings, **TINY} if tiny else settings
    if tiny and "num_key_value_heads" in settings:
        sizes |= {"num_key_value_heads": 2}
    if tiny and "head_dim" in settings:
        sizes |= {"head_dim": 16}
    config = kind(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.config.architectures = [type(model).__name__]
    model.requires_grad_(False)
    return model


def _tokenizer() -> Any:
    vocab = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    folder = tempfile.mkdtemp(prefix="steerlens-gpu-")
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def make_pairs(n_pairs: int, n_tokens: int) -> sl.ContrastivePairs:
    """Pairs of random words, `n_tokens` a prompt with BOS."""
    draw = random.Random(0)
    rest = [" ".join(draw.choices(WORDS[2:], k=n_tokens - 2)) for _ in range(n_pairs)]
    return sl.ContrastivePairs.from_lists(
        [f"{WORDS[0]} {text}" for text in rest], [f"{WORDS[1]} {text}" for text in rest]
    )


def make_workload(model: Any, n_prompts: int, n_tokens: int) -> Workload:
    """Positive prompts of random ids alone, none padded; every token but the first is a label."""
    draw = random.Random(1)
    prompts = [
        TokenizedPrompt((1, *(draw.randrange(4, 204) for _ in range(n_tokens - 1))), (), f"{i}")
        for i in range(n_prompts)
    ]
    return Workload(
        positive=make_batches(model, prompts, n_prompts),
        negative=(),
        position=-1,
        steered_positions="all",
    )


def make_jobs(model: Any, layers: Sequence[int], coefficients: Sequence[float]) -> list[Job]:
    """Random directions at block outputs."""
    generator = torch.Generator().manual_seed(2)
    n_layers, width = int(model.cfg.n_layers), int(model.cfg.d_model)
    jobs = []
    for layer in layers:
        direction = torch.randn(width, generator=generator)
        name = resid_post(layer)
        unit = (direction / direction.norm()).to(model.cfg.device)
        jobs.append(Job(name, unit, tuple(coefficients), readout_hook(name, n_layers)))
    return jobs


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a model: a token through a block, and a label's logits."""

    weights: float
    attention_width: int
    label: float

    @classmethod
    def of(cls, model: Any) -> "Arithmetic":
        """Of the weight matrices that the blocks hold."""
        config, blocks = model.original_model.config, model.blocks
        weights = {id(w): w.numel() for w in blocks[0].parameters() if w.ndim == 2}
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            2.0 * sum(weights.values()),
            head * config.num_attention_heads,
            2.0 * config.hidden_size * config.vocab_size,
        )

    def block(self, n_tokens: int) -> float:
        """A token through a block, in a causal prompt of `n_tokens`: half of them are looked at."""
        return self.weights + 2.0 * n_tokens * self.attention_width

    def sweep(self, n_layers: int, jobs: Sequence[Job], n_prompts: int, n_tokens: int) -> float:
        """What the cells need: blocks from each hook on, labels, and one unsteered residual."""
        tokens = n_prompts * n_tokens
        carried = max(job.first_block for job in jobs)
        blocks = sum(len(job.coefficients) * (n_layers - job.first_block) for job in jobs)
        n_labels = n_prompts * (n_tokens - 1) * sum(len(job.coefficients) for job in jobs)
        return tokens * self.block(n_tokens) * (blocks + carried) + n_labels * self.label

    def whole_sweep(self, n_layers: int, n_cells: int, n_pairs: int, n_tokens: int) -> float:
        """What a sweep of all block outputs needs at `n_cells` coefficients.

        The positive side runs to the last block, the negative one to the readout; both once
        unsteered.
        """
        blocks = 2 * (n_layers - 1)
        for layer in range(n_layers):
            read = hook_layer(readout_hook(resid_post(layer), n_layers))
            blocks += n_cells * (n_layers - 1 - layer + read - layer)
        n_labels = n_pairs * (n_tokens - 1) * n_cells * n_layers
        return n_pairs * n_tokens * self.block(n_tokens) * blocks + n_labels * self.label


@torch.no_grad()
def hook_loop(
    plain: Any, layers: Any, batch: Batch, cells: Sequence[tuple[Job, float]]
) -> list[Tensor]:
    """The plain loop: a whole forward pass of Hugging Face's model a cell, two forward hooks."""
    found = []
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    for job, coefficient in cells:
        kept: list[Tensor] = []
        step = coefficient * job.direction
        block, readout = (int(name.split(".")[1]) for name in (job.hook_name, job.readout))

        def add(out: Any, step: Tensor = step) -> Any:
            return out + step.to(out) if isinstance(out, Tensor) else (out[0] + step, *out[1:])

        def keep(out: Any, kept: list[Tensor] = kept) -> None:
            kept.append((out if isinstance(out, Tensor) else out[0])[rows, -1].float())

        with hooked(layers, {block: add}), hooked(layers, {readout: keep}):
            logits = plain(batch.tokens, use_cache=False).logits
        logprob = label_logprob(logits, batch.tokens, batch.label_mask())
        kept[0].cpu()
        found.append(logprob.cpu())
    return found


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds that `run()` takes, to the end of what the device was given."""
    wait(device)
    started = perf_counter()
    run()
    wait(device)
    return perf_counter() - started


def matrix_peak(device: str, *, size: int = 8192, seconds: float = 2.0) -> tuple[float, float]:
    """Operations a second of a bf16 matrix product: the best of ten, and all through `seconds`."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    best = min(timed(lambda: [a @ b for _ in range(5)], device) / 5 for _ in range(10))
    wait(device)
    started, n = perf_counter(), 0
    while perf_counter() - started < seconds:
        for _ in range(20):
            a @ b
        n += 20
        wait(device)
    through = (perf_counter() - started) / n
    return 2 * size**3 / best, 2 * size**3 / through
