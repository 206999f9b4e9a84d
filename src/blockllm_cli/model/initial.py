"""`model.init`: where a checkpoint of Hugging Face's form lies, and the architecture that it brings. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blockllm_cli.durable import read_json
from blockllm_cli.errors import InputError
from blockllm_cli.hub.files import hub_file
from blockllm_cli.hub.link import PROBE_SECONDS, Link
from blockllm_cli.model.config import SIZES, ErrorFactory, LlamaConfig
from blockllm_cli.model.hf_config import CONFIG_FILE, architecture
from blockllm_cli.recipe.sections import Model

_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class InitialFiles:
    """The files of one checkpoint: in a folder, or in a repository of the hub.

    Attributes:
        name: as the recipe gives it.
        folder: None if it is the name of a repository.
        link: how a hub is asked.
        should_stop: looked at while files are fetched.
    """

    name: str
    folder: Path | None
    link: Link
    should_stop: Callable[[], bool]

    def find(self, filename: str) -> Path | None:
        """The file on disk, fetched if need be; None if the checkpoint has no such file.

        Raises:
            InputError: the hub is out of reach, or has no such repository.
            StopRequested: `should_stop` became true.
        """
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        match = _HUB_NAME.fullmatch(self.name)
        assert match is not None  # `initial_files` has looked
        return hub_file(
            match["repository"],
            filename,
            kind="model",
            link=self.link,
            should_stop=self.should_stop,
            revision=match["revision"],
        )

    def config(self) -> LlamaConfig:
        """The architecture that the checkpoint's config.json describes.

        Raises:
            InputError: there is none, or it is that of another kind of model.
        """
        path = self.find(CONFIG_FILE)
        if path is None:
            raise InputError(f"model.init: {self.name} has no {CONFIG_FILE}, which every checkpoint of this form has")
        return architecture(read_json(path), str(path))


def initial_files(name: str, link: Link, should_stop: Callable[[], bool] = lambda: False) -> InitialFiles:
    """The checkpoint that `model.init = name` means: a folder if there is one, else `owner/name[@revision]` of the hub.

    Args:
        name: value of the key.
        link: how a hub is asked.
        should_stop: looked at while files are fetched.

    Raises:
        InputError: there is no such folder, and it is not the form of a hub's names.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return InitialFiles(name, folder, link, should_stop)
    if folder.exists():
        raise InputError(f"model.init: {name} is a file; give the folder that has it and its {CONFIG_FILE}")
    if _HUB_NAME.fullmatch(name) is None:
        raise InputError(
            f"model.init: there is no folder {name}; give a folder with {CONFIG_FILE} and .safetensors files, or "
            "owner/name of the hub"
        )
    return InitialFiles(name, None, link, should_stop)


def with_initial_architecture(model: Model, error: ErrorFactory) -> Model:
    """`model` with the fields that its `init` brings; itself where it names none, or gives all of them already.

    The recipe in a run folder gives all of them, so that a resume does not read the checkpoint again.

    Args:
        model: the table.
        error: makes the error for a key.

    Raises:
        InputError: the checkpoint cannot be read.
        RecipeError: a field is given and is not what the checkpoint has.
    """
    if model.init is None or all(getattr(model, name) is not None for name in LlamaConfig.__dataclass_fields__):
        return model
    found = initial_files(model.init, Link(PROBE_SECONDS)).config()
    check_agreement(model, found, error)
    return model.model_copy(update=vars(found))


def check_agreement(model: Model, found: LlamaConfig, error: ErrorFactory) -> None:
    """Refuse a field of the recipe that is not what the checkpoint of `model.init` has.

    Raises:
        RecipeError: naming the key and both values.
    """
    for name, value in (SIZES.get(model.size, {}) if model.size else {}).items():
        if getattr(model, name) is None and getattr(found, name) != value:
            raise error(
                "model.size",
                f"is {model.size!r}, whose {name} is {value}, and that of model.init ({model.init}) is "
                f"{getattr(found, name)}",
                fix="leave the size out",
            )
    for name in LlamaConfig.__dataclass_fields__:
        given, there = getattr(model, name), getattr(found, name)
        if given is not None and given != there:
            raise error(
                f"model.{name}",
                f"is {given}, and that of model.init ({model.init}) is {there}",
                fix="leave it out, or take another checkpoint",
            )
