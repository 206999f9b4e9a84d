"""The tables of a recipe as frozen, strict models: every key with its type, range, unit and meaning.

Ranges of single keys live here; checks between keys live in `checks.py`, where an error can name one key. A default
is given only where leaving the key out has one obvious meaning; `None` is the absence of a key, never a value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SEED_LIMIT = 2**63 - 1  # the largest integer that TOML guarantees to carry

PrecisionWord = Literal["auto", "fp32", "bf16", "bf16_master", "bf16_papers"]


def _as_tuple(value: Any) -> Any:
    """One glob is a list of one; lists become tuples, so that a frozen table cannot be changed."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple), Field(min_length=1)]


Tags = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """A table of the recipe: no unknown key, no conversion between types, no change after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    """`[run]`: the run as a whole, and the machine it uses."""

    name: str = Field("run", min_length=1, description="name of the run's folder under `output`")
    seed: int = Field(0, ge=0, le=SEED_LIMIT, description="seed from which those of model, data and method derive")
    output: str = Field("runs", min_length=1, description="folder that runs are written to, from where you start it")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+|mps)$",
        description="where the model lives",
        json_schema_extra={"allowed": '"auto", "cpu", "cuda", "cuda:N" or "mps"'},
    )
    precision: PrecisionWord = Field(
        "auto", description="types of weights, products, accumulators and moments; auto takes what is faster here"
    )
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="rounding of bf16 writes of an update")
    compile: Literal["off", "layer"] = Field(
        "off", description="whether decoder layers are trained as one compiled function, by torch.compile"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; absent: one per physical core")
    deterministic: bool | None = Field(
        None, description="deterministic kernels, on which a bit-exact resume rests; absent: true on CPU only"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="on a loss or gradient that is not finite: stop the run, or skip the update"
    )


class Model(Section):
    """`[model]`: a published size, or every field of the architecture under its Hugging Face name."""

    size: str | None = Field(None, min_length=1, description="published size, such as 60m; fields beside it override")
    hidden_size: int | None = Field(None, ge=1, description="width of the residual stream")
    intermediate_size: int | None = Field(None, ge=1, description="width of the gated MLP")
    num_attention_heads: int | None = Field(None, ge=1, description="query heads; must divide hidden_size")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="key and value heads; must divide num_attention_heads; absent: as many"
    )
    num_hidden_layers: int | None = Field(None, ge=1, description="decoder layers")
    vocab_size: int | None = Field(
        None, ge=1, description="rows of embedding and head; absent: the tokenizer's, rounded up to a multiple of 64"
    )
    rope_theta: float | None = Field(None, gt=0, description="base of the rotary wavelengths; absent: 10000")
    rms_norm_eps: float | None = Field(None, gt=0, description="added to the mean square in a norm; absent: 1e-6")
    tie_word_embeddings: bool | None = Field(None, description="whether the head is the embedding; absent: false")
    initializer_range: float | None = Field(
        None, gt=0, description="standard deviation of the initial matrices; absent: 0.02"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute each layer in the backward pass instead of keeping its activations"
    )
    seed: int | None = Field(None, ge=0, le=SEED_LIMIT, description="seed of the initial weights; absent: from run")
    init: str | None = Field(
        None,
        min_length=1,
        description="Llama to begin with, architecture included: a folder with config.json and .safetensors, or "
        "owner/name[@revision] of the hub; absent: weights are drawn",
    )


class Tokenizer(Section):
    """`[tokenizer]`: trained from the corpus, read from a file, or named on the hub."""

    source: Literal["train", "file", "hub"] = Field("train", description="where the tokenizer comes from")
    path: str | None = Field(
        None,
        min_length=1,
        description='sentencepiece model or tokenizer.json (source = "file"), or repository on the hub, as owner/name '
        '(source = "hub")',
    )
    vocab_size: int | None = Field(
        None, ge=260, description='pieces to train (source = "train"); 256 of them are bytes'
    )
    kind: Literal["bpe", "unigram"] = Field("bpe", description='algorithm of the training (source = "train")')
    sample_bytes: int = Field(
        20_000_000, ge=1, description='bytes of text that the training reads at most (source = "train")'
    )


class Data(Section):
    """`[data]`: the text, and how documents become rows."""

    corpus: Literal["builtin", "files", "c4", "hub"] = Field("builtin", description="where documents come from")
    repository: str | None = Field(None, min_length=1, description='dataset on the hub, as owner/name (corpus = "hub")')
    configuration: str | None = Field(
        None, min_length=1, description='configuration of that dataset (corpus = "hub"); absent: its default'
    )
    revision: str | None = Field(
        None, min_length=1, description='branch, tag or commit (corpus = "c4" and "hub"); absent: the main branch'
    )
    train: Globs | None = Field(
        None,
        description='corpus = "files": globs of files to train on; corpus = "hub": splits, or globs of paths in the '
        'repository, absent: "train"',
    )
    validation: Globs | None = Field(
        None,
        description='likewise, to validate on; absent: with corpus = "hub" the split "validation" if there is one, '
        "else 1 document in 20 is held out from train, by hash",
    )
    sequence_length: int = Field(ge=2, description="input positions of a row")
    layout: Literal["truncate", "pack"] = Field(
        "truncate", description="one cut document per row, padded; or documents packed without a gap"
    )
    block_documents: int = Field(4096, ge=1, description="documents that are shuffled together: the mixing radius")
    on_exhausted: Literal["repeat", "stop"] = Field(
        "repeat", description="after the last document: a new epoch, or end"
    )
    max_bad_documents: int = Field(100, ge=0, description="unreadable documents that are skipped before it is an error")
    cache: str | None = Field(None, min_length=1, description="folder for what is made once; absent: the user's cache")
    shard_cache_bytes: int = Field(
        50_000_000_000, ge=0, description="bytes of fetched files that the cache keeps beside those in use"
    )
    retry_seconds: float = Field(
        900.0,
        ge=0,
        description="seconds without progress for which a hub that does not answer is asked again; then the run saves "
        "and stops",
    )
    workers: int = Field(1, ge=0, description="processes that tokenise beside the training; rows do not depend on it")
    seed: int | None = Field(None, ge=0, le=SEED_LIMIT, description="seed of the order of rows; absent: from run")


class Batch(Section):
    """`[batch]`: the rows of one update."""

    rows: int = Field(ge=1, description="rows of one update")
    micro_rows: int | None = Field(
        None, ge=1, description="rows of one forward and backward pass; must divide rows; absent: all of them"
    )


class Schedule(Section):
    """`[schedule]`: how long, and at which learning rates."""

    steps: int | None = Field(None, ge=1, description="updates; or give tokens")
    tokens: int | None = Field(
        None,
        ge=1,
        description="budget in token slots (rows x sequence_length per update, padding counts); or give steps",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="peak rate of the matrices; absent: what is published for the method and size"
    )
    dense_rate: float | None = Field(
        None, gt=0, description="peak rate of embedding, head and norms; absent: the method's, else learning_rate"
    )
    warmup: int | float = Field(
        0.1,
        ge=0,
        description="rise to the peak: an integer counts updates, a number below 1 is a share of all; 0: none",
        json_schema_extra={"allowed": "an integer of updates (0: none), or a share of all updates below 1"},
    )
    shape: Literal["cosine", "linear", "constant", "wsd", "papers"] = Field(
        "cosine", description="course after the warm-up; papers is the cosine of the published code with its quirks"
    )
    min_ratio: float = Field(0.1, ge=0, le=1, description="rate of the last update, as a share of the peak")
    clip: float | None = Field(
        None, ge=0, description="limit of the gradient norm; 0: off; absent: what is published for the method and size"
    )


class Evaluate(Section):
    """`[evaluate]`: the validation set and when it is scored."""

    every: int = Field(0, ge=0, description="updates between evaluations; 0: only at start and end")
    tokens: int = Field(100_000, ge=1, description="target tokens of the fixed validation set")
    rows: int = Field(16, ge=1, description="rows of one evaluation pass; the result does not depend on it")
    at_start: bool = Field(True, description="evaluate before the first update")
    legacy_rows: int | None = Field(
        None, ge=1, description="rows of a batch in the papers' biased perplexity; absent: as published for the size"
    )
    legacy_ranks: int | None = Field(
        None, ge=1, description="processes in the papers' biased perplexity; absent: as published for the size"
    )


class Checkpoint(Section):
    """`[checkpoint]`: what is saved for a resume."""

    every: int = Field(0, ge=0, description="updates between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


class Tracking(Section):
    """`[tracking]`: what is logged, and whether Weights & Biases shows it."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto is online with a key and a network, else offline files in the run"
    )
    project: str | None = Field(None, min_length=1, description="project in W&B; absent: $WANDB_PROJECT, else blockllm")
    entity: str | None = Field(None, min_length=1, description="user or team in W&B; absent: the account's default")
    group: str | None = Field(None, min_length=1, description="group of runs in W&B; absent: none")
    tags: Tags = Field((), description="tags of the run in W&B", json_schema_extra={"allowed": "a list of strings"})
    log_every: int = Field(10, ge=1, description="updates between rows of metrics.jsonl")
    log_rows: bool = Field(False, description="write rows.jsonl: which documents each update read")


class Recipe(Section):
    """Everything about one run.

    `method` stays a plain table here: its keys belong to the method that it names, and are checked by
    `methods.resolve`.
    """

    run: Run = Field(default_factory=Run)
    model: Model
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    data: Data
    batch: Batch
    schedule: Schedule
    method: dict[str, Any]
    evaluate: Evaluate = Field(default_factory=Evaluate)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)


SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "tokenizer": Tokenizer,
    "data": Data,
    "batch": Batch,
    "schedule": Schedule,
    "evaluate": Evaluate,
    "checkpoint": Checkpoint,
    "tracking": Tracking,
}
"""Every table but `[method]`, by name."""
