"""Which files a dataset repository has for each split. `datasets` resolves it; the answer is kept for the next time.

What is kept names every file with its size and hash, so that a corpus has an identity, and a prepared or fetched one
can be used, without asking anybody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockllm_cli.durable import CACHE_OPTION, storage_error, storage_errors, write_json
from blockllm_cli.errors import InputError
from blockllm_cli.hub.http import check_status, endpoint, quiet, shown, transport_faults
from blockllm_cli.hub.link import FaultError, Link
from blockllm_cli.hub.remote import RemoteFile

_VERSION = 1
_PATHS_AT_ONCE = 500


@dataclass(frozen=True)
class Wanted:
    """A dataset of a hub.

    Attributes:
        repository: `owner/name`.
        configuration: name of a configuration of the repository; None: its default.
        revision: branch, tag or commit; None: the main branch.
    """

    repository: str
    configuration: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        configuration = f" ({self.configuration})" if self.configuration else ""
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.repository}{configuration}{revision}"


@dataclass(frozen=True)
class Listing:
    """The files of a dataset at one commit.

    Attributes:
        commit: full hash.
        splits: the files of each split, in the order of the repository.
    """

    commit: str
    splits: dict[str, tuple[RemoteFile, ...]]


def kept_listing(wanted: Wanted, folder: Path) -> Listing | None:
    """The listing that `fetch_listing` kept in `folder`, if it can be read."""
    try:
        kept = json.loads(_place(wanted, folder).read_text("utf-8"))
        splits = {name: tuple(RemoteFile(**file) for file in files) for name, files in kept["splits"].items()}
        return Listing(kept["commit"], splits)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def fetch_listing(wanted: Wanted, folder: Path, link: Link, should_stop: Callable[[], bool]) -> Listing:
    """Ask the hub for the files of a dataset, and keep the answer in `folder`.

    Raises:
        InputError: there is no such dataset, configuration or revision, or the hub does not answer in time.
        StorageError: the answer cannot be kept.
        StopRequested: `should_stop` became true.
    """
    what = f"the list of files of {wanted}"
    link.doing = what
    listing = link.patiently(what, lambda: _ask(wanted), should_stop)
    link.doing = ""
    place = _place(wanted, folder)
    with storage_errors(place, "write", option=CACHE_OPTION):
        place.parent.mkdir(parents=True, exist_ok=True)
    splits = {name: [file.as_json() for file in files] for name, files in listing.splits.items()}
    write_json(place, {"dataset": str(wanted), "commit": listing.commit, "splits": splits})
    return listing


def _place(wanted: Wanted, folder: Path) -> Path:
    key = json.dumps([_VERSION, wanted.repository, wanted.configuration, wanted.revision])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return folder / f"{wanted.repository.replace('/', '--')}-{digest}.json"


def _ask(wanted: Wanted) -> Listing:
    """One attempt; every error of the libraries becomes one of ours."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    quiet()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_ENDPOINT = endpoint()  # as it reads the variable, a slash at the end is asked for twice
    api = HfApi(endpoint=endpoint())
    try:
        with transport_faults():
            commit = str(api.dataset_info(wanted.repository, revision=wanted.revision).sha)
            # By its commit nothing is asked of the hub's other servers, whose answers are not needed.
            builder = datasets.load_dataset_builder(wanted.repository, wanted.configuration, revision=commit)
            paths = _paths(builder.config.data_files or {}, f"hf://datasets/{wanted.repository}@{commit}/")
            files = _described(api, wanted.repository, commit, [path for split in paths.values() for path in split])
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"{wanted.repository}: {shown(endpoint())} has no such dataset, or it is not open to everyone: check the "
            "name, or log in with `hf auth login` or HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{wanted.repository} has no revision {wanted.revision!r}") from error
    except HfHubHTTPError as error:
        check_status(error.response, f"{endpoint()}, asked for {wanted}")
        raise FaultError(str(error)) from error
    except ConnectionError as error:
        raise FaultError(str(error)) from error
    except FaultError:
        raise
    except Exception as error:
        raise _refusal(error, wanted) from error
    return Listing(commit, {name: tuple(files[path] for path in split) for name, split in paths.items()})


def _refusal(error: Exception, wanted: Wanted) -> Exception:
    """What an error of the libraries means that says it by no type: they pass on those of YAML, JSON and the disk."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):  # its word for: the hub did not give a file that it lists
            return FaultError(str(cause.__cause__ or cause).partition("\n")[0])
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.errno is not None:
        place = Path(error.filename) if isinstance(error.filename, str) else Path.cwd()
        return storage_error(place, "write", error, option="the environment variable HF_HOME")
    if isinstance(error, (KeyError, TypeError, AttributeError, json.JSONDecodeError)):
        return InputError(
            f"{shown(endpoint())}, asked for {wanted}, gives an answer that is none of a hub's "
            f"({type(error).__name__}: {error}): check HF_ENDPOINT, and whether a proxy or a log-in page stands between"
        )
    return InputError(f"{wanted} cannot be used: {error}")


def _paths(data_files: Any, prefix: str) -> dict[str, list[str]]:
    """Paths inside the repository, by split."""
    return {
        str(split): [str(file).removeprefix(prefix) for file in files if str(file).startswith(prefix)]
        for split, files in data_files.items()
    }


def _described(api: Any, repository: str, commit: str, paths: Sequence[str]) -> dict[str, RemoteFile]:
    """Size and hash of each file."""
    found: dict[str, RemoteFile] = {}
    for part in _parts(list(dict.fromkeys(paths))):
        for file in api.get_paths_info(repository, part, revision=commit, repo_type="dataset"):
            content = file.lfs.sha256 if file.lfs else file.blob_id
            found[file.path] = RemoteFile(repository, "dataset", commit, file.path, file.size, content)
    missing = sorted(set(paths) - found.keys())
    if missing:
        raise FaultError(f"the hub says nothing of {missing[0]}, one of {len(missing)} files that it lists")
    return found


def _parts(paths: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(paths), _PATHS_AT_ONCE):
        yield list(paths[begin : begin + _PATHS_AT_ONCE])
