"""The weights that a run begins with: drawn from a seed, or those of `model.init`, and what is remembered of them.

`init.json` in a run folder names the checkpoint, with the hash of every file, and the hash of every parameter as the
run began with it. So neither a resume nor the list of parameters that never moved needs the checkpoint again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.data.tokenizer import AnyTokenizer, load_tokenizer
from blockllm_cli.durable import file_sha256, write_json
from blockllm_cli.errors import BlockLLMError, InputError
from blockllm_cli.methods.resolve import Resolved
from blockllm_cli.model.hf_config import CONFIG_FILE
from blockllm_cli.model.initial import InitialFiles, check_agreement, initial_files
from blockllm_cli.model.initial_weights import InitialWeights, equal_to_hashes, tensor_sha256
from blockllm_cli.model.llama import LlamaForCausalLM, build_model, equal_to_initial, model_of
from blockllm_cli.optim.precision import Precision
from blockllm_cli.runner.inputs import Inputs
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.run_folder import RunFolder
from blockllm_cli.tracking.terminal import Terminal

INIT = "init.json"


@dataclass
class InitialModel:
    """A checkpoint that a run begins with, checked and hashed.

    Attributes:
        name: value of `model.init`.
        files: file name -> SHA-256.
        weights: its tensors.
        tensors: parameter name -> SHA-256 of the values that the run began with; filled when the model is made.
    """

    name: str
    files: Mapping[str, str]
    weights: InitialWeights
    tensors: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Content of init.json."""
        return {"name": self.name, "files": dict(self.files), "tensors": self.tensors}


def open_initial(
    resolved: Resolved, inputs: Inputs, folder: RunFolder | None, terminal: Terminal, watchdog: Watchdog
) -> InitialModel | None:
    """The checkpoint of `model.init`, with everything about it checked; None where weights are drawn.

    Args:
        resolved: the recipe.
        inputs: of the run; the tokenizer is compared with one that lies beside the weights.
        folder: of a run that goes on from its beginning: the checkpoint must be the one that it began with.
        terminal: told of what takes long, and of what is odd.
        watchdog: has the link to the hub; asked whether to stop while files are fetched and hashed.

    Raises:
        InputError: the checkpoint cannot be used, or is another one by now.
        RecipeError: the recipe says otherwise than its config.json.
        StopRequested: a stop was asked for.
    """
    name = resolved.recipe.model.init
    if name is None:
        return None
    with terminal.progress(f"reading the initial model, {name}"):
        files = initial_files(name, watchdog.link, watchdog)
        check_agreement(resolved.recipe.model, files.config(), resolved.loaded.error)
        weights = InitialWeights(files, inputs.config)
        config = files.find(CONFIG_FILE)
        assert config is not None  # it has just been read
        hashes = {CONFIG_FILE: file_sha256(config), **weights.file_hashes(watchdog)}
    before = read_record(folder) if folder is not None else None
    if folder is not None and before is not None and before["files"] != hashes:
        raise InputError(f"model.init: {name} is not what the run in {folder.path} began with; put the files back")
    _compare_tokenizers(files, inputs.tokenizer, terminal)
    return InitialModel(name, hashes, weights)


def _compare_tokenizers(files: InitialFiles, tokenizer: AnyTokenizer, terminal: Terminal) -> None:
    """Say so if the tokenizer beside the weights gives other ids than the run's; one that cannot be read may."""
    for name in ("tokenizer.model", "tokenizer.json"):
        with suppress(BlockLLMError):
            path = files.find(name)
            if path is None:
                continue
            if load_tokenizer(path).sha256 != tokenizer.sha256:
                terminal.say(
                    f"note: the tokenizer of this run is not the one beside the initial model ({path}): its embedding "
                    "was trained with other ids"
                )
            return


def begin(
    resolved: Resolved, inputs: Inputs, initial: InitialModel | None, precision: Precision, device: Any
) -> LlamaForCausalLM:
    """The model as it is before the first update: drawn, or with the values of `initial` in the dtype of the run."""
    recipe = resolved.recipe
    checkpoint_activations = recipe.model.checkpoint_activations
    if initial is None:
        assert recipe.model.seed is not None  # filled when the recipe was resolved
        return build_model(
            inputs.config,
            seed=recipe.model.seed,
            dtype=precision.weights,
            device=device,
            checkpoint_activations=checkpoint_activations,
        )

    def stored(name: str, shape: Sequence[int]) -> Tensor:
        values = initial.weights[name].to(precision.weights)
        if not torch.isfinite(values).all():
            raise InputError(
                f"model.init: {name!r} in {initial.name} has values that are not finite in {precision.weights}: the "
                "checkpoint is damaged, or diverged"
            )
        initial.tensors[name] = tensor_sha256(values)
        return values

    return model_of(
        inputs.config,
        stored,
        dtype=precision.weights,
        device=device,
        checkpoint_activations=checkpoint_activations,
    )


def write_record(folder: RunFolder, initial: InitialModel) -> None:
    """Write init.json.

    Raises:
        StorageError: the disk refuses.
    """
    write_json(folder.path / INIT, initial.record())


def read_record(folder: RunFolder) -> dict[str, Any] | None:
    """What init.json says; None if the run has none yet, or drew its weights.

    Raises:
        InputError: it is damaged.
    """
    path: Path = folder.path / INIT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or not {"name", "files", "tensors"} <= record.keys():
        raise InputError(f"{path} does not say what the run began with")
    return record


def still_initial(
    model: LlamaForCausalLM, names: Sequence[str], resolved: Resolved, folder: RunFolder
) -> list[str] | None:
    """Those of the parameters `names` that have the values the run began with; None if that is no longer known.

    Drawn ones are drawn again, one at a time; those of a checkpoint are known by their hashes.
    """
    if resolved.recipe.model.init is not None:
        record = read_record(folder)
        return None if record is None else equal_to_hashes(model, names, record["tensors"])
    seed = resolved.recipe.model.seed
    assert seed is not None  # filled when the recipe was resolved
    return equal_to_initial(model, names, seed=seed)
