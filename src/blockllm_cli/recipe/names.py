"""Finding the key that was meant: nearest names, keys of other tables, words of other tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from blockllm_cli.recipe.sections import SECTIONS

TABLES: tuple[str, ...] = (
    "run",
    "model",
    "tokenizer",
    "data",
    "batch",
    "schedule",
    "method",
    "evaluate",
    "checkpoint",
    "tracking",
)

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "lr": "schedule.learning_rate",
        "max_lr": "schedule.learning_rate",
        "peak_lr": "schedule.learning_rate",
        "warmup_steps": "schedule.warmup",
        "warmup_ratio": "schedule.warmup",
        "num_warmup_steps": "schedule.warmup",
        "scheduler": "schedule.shape",
        "lr_scheduler_type": "schedule.shape",
        "min_lr_ratio": "schedule.min_ratio",
        "num_training_steps": "schedule.steps",
        "max_steps": "schedule.steps",
        "max_train_tokens": "schedule.tokens",
        "grad_clip": "schedule.clip",
        "grad_clipping": "schedule.clip",
        "max_grad_norm": "schedule.clip",
        "batch_size": "batch.rows",
        "total_batch_size": "batch.rows",
        "global_batch_size": "batch.rows",
        "micro_batch_size": "batch.micro_rows",
        "per_device_train_batch_size": "batch.micro_rows",
        "gradient_accumulation": "batch.micro_rows",
        "gradient_accumulation_steps": "batch.micro_rows",
        "max_length": "data.sequence_length",
        "max_seq_length": "data.sequence_length",
        "seq_len": "data.sequence_length",
        "block_size": "data.sequence_length",
        "dataset": "data.corpus",
        "num_workers": "data.workers",
        "packing": "data.layout",
        "dtype": "run.precision",
        "optimizer": "method.name",
        "optim": "method.name",
        "beta1": "method.betas",
        "beta2": "method.betas",
        "betas": "method.betas",
        "eps": "method.eps",
        "wd": "method.weight_decay",
        "weight_decay": "method.weight_decay",
        "activation_checkpointing": "model.checkpoint_activations",
        "gradient_checkpointing": "model.checkpoint_activations",
        "n_layer": "model.num_hidden_layers",
        "n_head": "model.num_attention_heads",
        "n_embd": "model.hidden_size",
        "dim": "model.hidden_size",
        "eval_every": "evaluate.every",
        "eval_steps": "evaluate.every",
        "save_every": "checkpoint.every",
        "save_steps": "checkpoint.every",
        "logging_steps": "tracking.log_every",
    }
)
"""Words of other tools for keys of ours."""


def did_you_mean(key: str, table: str, valid: Iterable[str]) -> str:
    """A hint for the unknown `key` of `[table]`, whose keys are `valid`: the nearest key, its table, or the choices."""
    valid = list(valid)
    plain = key.lower().replace("-", "_")
    if plain in valid:
        return f"did you mean {plain}?"
    others = [other for other, section in SECTIONS.items() if plain in section.model_fields]
    if others:
        return f"{plain} belongs to {' or '.join(f'[{other}]' for other in others)}"
    if plain in SYNONYMS:
        owner, name = SYNONYMS[plain].split(".")
        if owner != table:
            return f"did you mean {name} of [{owner}]?"
        if name in valid:
            return f"did you mean {name}?"
    near = get_close_matches(plain, valid, n=1)
    if near:
        return f"did you mean {near[0]}?"
    for other, section in SECTIONS.items():
        near = get_close_matches(plain, section.model_fields, n=1, cutoff=0.75)
        if near:
            return f"did you mean {near[0]} of [{other}]?"
    return f"[{table}] has {', '.join(valid)}"


def which_table(name: str) -> str:
    """A hint for `name`, which stands at the top of a recipe and is no table."""
    plain = name.lower().replace("-", "_")
    owners = [table for table, section in SECTIONS.items() if plain in section.model_fields]
    if owners:
        return f"{plain} belongs to {' or '.join(f'[{owner}]' for owner in owners)}"
    if plain in SYNONYMS:
        owner, key = SYNONYMS[plain].split(".")
        return f"did you mean {key} of [{owner}]?"
    near = get_close_matches(plain, [*TABLES, "extends"], n=1)
    return f"did you mean {near[0]}?" if near else f"the tables are {', '.join(TABLES)}"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that looks most like `name`, if any does."""
    near = get_close_matches(name.lower(), list(choices), n=1, cutoff=0.5)
    return near[0] if near else None
