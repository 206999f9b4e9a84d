"""Whether a run is seen in W&B, and how: decided from recipe, environment and files before W&B is touched.

The network is not asked here; what this decides costs no time. Whether the server answers is found out beside the
training (`server_problem`, called in the tracking process).
"""

from __future__ import annotations

import configparser
import http.client
import importlib.util
import netrc
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Wanted = Literal["auto", "online", "offline", "off"]
Mode = Literal["online", "offline", "off"]

PUBLIC_SERVER = "https://api.wandb.ai"
PROBE_SECONDS = 4.0  # until the server counts as out of reach
LOWERING_VARIABLES = ("WANDB_MODE", "WANDB_DISABLED")
_TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Choice:
    """What was decided.

    Attributes:
        mode: what W&B is asked to do; for `online` the server may still turn out to be out of reach.
        reason: why it is less than the recipe asks for, or empty.
        server: address of the W&B server.
    """

    mode: Mode
    reason: str = ""
    server: str = PUBLIC_SERVER


def choose_mode(wanted: Wanted, environment: Mapping[str, str]) -> Choice:
    """The mode of a run.

    The environment can lower what a recipe asks for and never raises it, so that a machine without a network, or a
    test suite, needs no other recipes: `WANDB_MODE` or `WANDB_DISABLED` set to disabled turn tracking off, `WANDB_MODE`
    set to offline keeps it off the network. What is missing lowers it as well: the package (off), a key (offline).

    Args:
        wanted: `tracking.wandb` of the recipe.
        environment: variables of the process; `HOME` and `WANDB_CONFIG_DIR` say where W&B's own files are.
    """
    if wanted == "off":
        return Choice("off")
    settings = _settings(environment)
    server = (environment.get("WANDB_BASE_URL") or settings.get("base_url") or PUBLIC_SERVER).rstrip("/")
    mode, disabled = (environment.get(name, "") for name in LOWERING_VARIABLES)
    said = (mode or settings.get("mode") or "").lower()
    if said == "disabled" or disabled.lower() in _TRUE:
        # To switch W&B off like that is not to be told so at each run.
        return Choice("off", "" if wanted == "auto" else "W&B is disabled by its environment or settings", server)
    if importlib.util.find_spec("wandb") is None:
        return Choice("off", "the package wandb is not installed", server)
    if wanted == "offline":
        return Choice("offline", "", server)
    if said in ("offline", "dryrun"):
        return Choice("offline", "W&B is set to offline by its environment or settings", server)
    if not _has_credentials(server, environment):
        return Choice("offline", "there is no API key (`wandb login` stores one)", server)
    return Choice("online", "", server)


def server_problem(server: str) -> str | None:
    """Why `server` cannot be reached, or None where it answers; takes a few seconds at most where names resolve.

    Proxies are those of the environment, as W&B takes them.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}" if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return str(getattr(reason, "strerror", None) or reason) or type(error).__name__


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What W&B's own settings files say: that of the user, then that of the current folder over it."""
    home = Path(environment.get("HOME") or "~").expanduser()
    folder = Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    for path in (folder / "settings", Path("wandb") / "settings"):
        try:
            parser.read(path, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            continue  # W&B reports a damaged file itself
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_credentials(server: str, environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environment.get("HOME") or "~").expanduser()
    named = environment.get("NETRC")
    places = [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]
    for path in places:
        try:
            found = netrc.netrc(str(path)).authenticators(urlsplit(server).netloc)
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
        if found is not None and found[2]:
            return True
    return False
