"""Whether a run is seen in W&B is decided before W&B is touched, and costs nothing."""

import socket
import sys

import pytest

from blockllm_cli.tracking import wandb_choice
from blockllm_cli.tracking.wandb_choice import choose_mode, server_problem
from support.wandb_server import WandbServer

KEY = {"WANDB_API_KEY": "k"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("wanted", "environment", "mode", "word"),
    [
        ("off", KEY, "off", ""),
        ("auto", {}, "offline", "no API key"),
        ("online", {}, "offline", "no API key"),
        ("auto", KEY, "online", ""),
        ("online", KEY, "online", ""),
        ("offline", KEY, "offline", ""),
        ("offline", {}, "offline", ""),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "token"}, "online", ""),
        ("online", {**KEY, "WANDB_MODE": "offline"}, "offline", "set to offline"),
        ("auto", {**KEY, "WANDB_MODE": "dryrun"}, "offline", "set to offline"),
        ("auto", {**KEY, "WANDB_MODE": ""}, "online", ""),
        ("offline", {**KEY, "WANDB_MODE": "online"}, "offline", ""),
        ("auto", {**KEY, "WANDB_MODE": "disabled"}, "off", ""),
        ("online", {**KEY, "WANDB_MODE": "disabled"}, "off", "disabled"),
        ("auto", {**KEY, "WANDB_DISABLED": "true"}, "off", ""),
        ("auto", {**KEY, "WANDB_DISABLED": "false"}, "online", ""),
    ],
)
def test_the_environment_lowers_what_the_recipe_asks_and_never_raises_it(home, wanted, environment, mode, word):
    choice = choose_mode(wanted, {**home, **environment})
    assert choice.mode == mode
    assert word in choice.reason
    assert bool(word) == bool(choice.reason)


def test_a_missing_package_turns_it_off_and_says_so(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert choose_mode("auto", home | KEY).mode == "off"
    assert "not installed" in choose_mode("auto", home | KEY).reason


def test_a_key_in_netrc_counts_for_its_own_server(home, tmp_path):
    (tmp_path / "keys").write_text("machine wandb.local:8080 login user password k\n", encoding="utf-8")
    (tmp_path / "keys").chmod(0o600)
    named = {**home, "NETRC": str(tmp_path / "keys")}
    assert choose_mode("auto", named).mode == "offline"
    ours = choose_mode("auto", {**named, "WANDB_BASE_URL": "http://wandb.local:8080/"})
    assert (ours.mode, ours.server) == ("online", "http://wandb.local:8080")


def test_the_netrc_of_the_home_is_found(home, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    assert choose_mode("auto", home).mode == "online"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login", encoding="utf-8")
    assert choose_mode("auto", home).mode == "offline"


def test_what_wandb_stored_in_its_settings_counts(home, tmp_path):
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    user = tmp_path / ".config" / "wandb" / "settings"
    user.write_text("[default]\nbase_url = http://wandb.local\n", encoding="utf-8")
    assert choose_mode("auto", home | KEY).server == "http://wandb.local"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n", encoding="utf-8")
    assert choose_mode("auto", home | KEY).mode == "off"
    user.write_text("no section\n", encoding="utf-8")
    assert choose_mode("auto", home | KEY).mode == "off"


def test_a_server_that_answers_has_no_problem():
    with WandbServer() as server:
        assert server_problem(server.url) is None
        server.status = 404
        assert server_problem(server.url) is None
        server.status = 503
        assert "503" in server_problem(server.url)


def test_a_refused_connection_and_a_server_that_keeps_silent_are_problems(monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert "refused" in server_problem(address)
        monkeypatch.setattr(wandb_choice, "PROBE_SECONDS", 0.05)
        listening.listen()
        assert "timed out" in server_problem(address)
    assert server_problem("not an address")
