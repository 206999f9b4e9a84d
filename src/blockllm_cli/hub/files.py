"""Single files of a hub: tokenizers, configurations, weights. `huggingface_hub` fetches and keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blockllm_cli.errors import InputError, StorageError
from blockllm_cli.hub.http import check_status, endpoint, quiet, shown, transport_faults
from blockllm_cli.hub.link import OFFLINE_WAYS, FaultError, Link
from blockllm_cli.hub.remote import Kind


def hub_file(
    repository: str,
    filename: str,
    *,
    kind: Kind,
    link: Link,
    should_stop: Callable[[], bool],
    revision: str | None = None,
) -> Path | None:
    """The file on disk, from the library's cache or fetched into it; None if the repository has no such file.

    Args:
        repository: `owner/name`.
        filename: inside the repository.
        kind: of the repository.
        link: how long a fault is borne.
        should_stop: looked at while waiting.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        InputError: there is no such repository, or the hub is out of reach and the file was not fetched before.
        StorageError: the disk refuses it.
        StopRequested: `should_stop` became true.
    """
    what = f"{filename} of {repository}"
    unreachable = link.probe(should_stop)
    if unreachable is not None:
        return _kept(repository, filename, kind, revision, f"{what} cannot be fetched: {unreachable}")
    link.doing = what
    # No limit: the weights of a model take as long as they take, and the library stops where nothing comes any more.
    found = link.patiently(
        what, lambda: _download(repository, filename, kind, revision), should_stop, limit=float("inf")
    )
    link.doing = ""
    return found


def _download(repository: str, filename: str, kind: Kind, revision: str | None) -> Path | None:
    """One attempt."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    quiet()
    try:
        with transport_faults():
            return Path(hf_hub_download(repository, filename, repo_type=kind, revision=revision, endpoint=endpoint()))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repository}: {shown(endpoint())} has no such {kind}, or it is not open to everyone: check the name, or "
            "log in with `hf auth login` or HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:  # its word for: the hub gave no answer
        raise FaultError(str(error.__cause__ or error)) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        check_status(error.response, f"{endpoint()}, asked for {filename} of {repository}")
        raise FaultError(str(error)) from error
    except OSError as error:
        raise StorageError(
            f"{filename} of {repository} cannot be kept: {error}; free some space, or name another folder in HF_HOME"
        ) from error


def _kept(repository: str, filename: str, kind: Kind, revision: str | None, failure: str) -> Path | None:
    """The file as it was fetched before; None if the repository was found not to have it then."""
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(repository, filename, repo_type=kind, revision=revision)
    if kept is not None and not isinstance(kept, str):
        return None
    if kept is None:
        raise InputError(f"{failure}, and it was not fetched before. What works {OFFLINE_WAYS}")
    return Path(kept)
