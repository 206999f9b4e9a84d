"""The requests themselves, over the session of `huggingface_hub`: its proxies, its token, `HF_ENDPOINT`."""

from __future__ import annotations

import contextlib
import email.utils
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from blockllm_cli.errors import InputError
from blockllm_cli.hub.link import PROBE_SECONDS, FaultError

# 404 and 416 of a file that the hub lists, with its size: its storage is not always in step with the list.
_PASSING = {404, 408, 416, 425, 429}
_RATE_LIMIT = re.compile(r"r=0\s*;\s*t=(\d+)")
_USER = re.compile(r"//[^/@\s]*@")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def endpoint() -> str:
    """The address of the hub: `HF_ENDPOINT`, or the public one."""
    from huggingface_hub import constants

    address: str = constants.ENDPOINT
    return address


def shown(address: str) -> str:
    """An address as it may stand in a message or a log: without a user's name and password."""
    return _USER.sub("//", address)


def quiet() -> None:
    """Let the client library say nothing by itself: what is tried again, and for how long, is said by `Link`."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity(logging.ERROR)


def probe() -> None:
    """Ask the hub for any answer.

    Raises:
        FaultError: there is none within `PROBE_SECONDS`.
    """
    from huggingface_hub.utils import get_session

    try:
        with transport_faults():
            get_session().head(endpoint(), timeout=PROBE_SECONDS)
    except FaultError:
        raise
    except Exception as error:  # an address that is none: the libraries on the way have several errors for it
        raise FaultError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def transport_faults() -> Iterator[None]:
    """Turn what the session raises when a connection fails into a `FaultError`."""
    from huggingface_hub.utils import get_session

    # The session is one of httpx or of its successor, as the version of the library has it.
    client = sys.modules[type(get_session()).__module__.partition(".")[0]]
    try:
        yield
    except client.RequestError as error:  # of the transport, and of answers that lead nowhere
        raise FaultError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
    except RuntimeError as error:
        # The session is shared by all threads, and the library closes it when one of them cannot connect.
        if "closed" not in str(error):
            raise
        raise FaultError("the connection was closed") from error


def fetch_range(url: str, start: int, stop: int, size: int, sink: bytearray, cancelled: threading.Event) -> None:
    """Append the bytes `start` to `stop` of the file at `url` to `sink`, as far as they come.

    Args:
        url: of a file of `size` bytes.
        start: first byte.
        stop: the byte after the last one.
        size: of the whole file; an answer about a file of another size is a fault.
        sink: what has come stays in it when the rest does not.
        cancelled: ends the transfer when set.

    Raises:
        FaultError: not all has come.
        InputError: the hub refuses for good.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    # Without `identity` the bytes on the way may be compressed, and a length would be that of something else.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with transport_faults(), get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        check_status(response, url)
        skip = _bytes_before(response, start, size)
        # As it comes: pieces of a fixed size would be held back, and lost when the connection is.
        for piece in response.iter_raw():
            if cancelled.is_set():
                return
            fresh = piece[skip:]
            skip -= len(piece) - len(fresh)
            sink += fresh[: stop - start - len(sink)]
            if len(sink) == stop - start:
                return
    raise FaultError(f"the answer ended after {len(sink):,} of {stop - start:,} bytes")


def check_status(response: Any, url: str) -> None:
    """Let a good answer pass.

    Raises:
        FaultError: a status that may pass.
        InputError: any other status that is an error.
    """
    status: int = response.status_code
    if status < 400:
        return
    text = f"{status} {response.reason_phrase}".strip()
    if status >= 500 or status in _PASSING:
        raise FaultError(text, _retry_after(response.headers))
    hint = ""
    if status in (401, 403):
        hint = "; log in with `hf auth login` or set HF_TOKEN, and accept the conditions on the repository's page"
    raise InputError(f"{shown(url)}: the hub answered {text}{hint}")


def _bytes_before(response: Any, start: int, size: int) -> int:
    """How many bytes of the answer lie before `start`: a server that knows no ranges sends the whole file."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length")
        if length is not None and int(length) != size:
            raise FaultError(f"the hub lists {size:,} bytes and sends a file of {length}")
        return start
    sent = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if sent is None or int(sent[1]) != start or sent[2] not in (str(size), "*"):
        raise FaultError(f"asked for bytes from {start:,} of {size:,}, got {response.headers.get('Content-Range')}")
    return 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait as the server says: `Retry-After` as a number or a date, or the hub's rate limit header."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        with contextlib.suppress(ValueError, OverflowError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    limited = _RATE_LIMIT.search(headers.get("ratelimit", ""))
    return float(limited[1]) if limited else None
