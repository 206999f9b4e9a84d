"""`blockllm doctor`: says what there is, in bounded time, and tells no secrets."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blockllm_cli import app
from blockllm_cli.commands import diagnosis
from blockllm_cli.commands.diagnosis import diagnose, has_hub_token, has_wandb_key, probe_hub
from blockllm_cli.training.precision import ProductSpeed

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "NETRC")


@pytest.fixture(autouse=True)
def bare_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder and an environment without any credentials."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_command_tells_everything_but_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-wandb-secret")
    monkeypatch.setenv("HF_TOKEN", "a-hub-secret")
    assert app.main(["doctor", "--no-network", "--output", str(tmp_path / "new" / "runs")]) == 0
    text = capsys.readouterr().out
    assert app.main(["doctor", "--no-network", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "secret" not in text + json.dumps(found)
    assert found["credentials"] == {"wandb": True, "huggingface": True}
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["fp32_flops"] > 0
    assert found["hub"] == {"reachable": None, "detail": "not asked (--no-network)"}
    for said in (torch.__version__, "GFLOP/s", str(tmp_path / "new" / "runs"), "W&B key", "GiB"):
        assert said in text
    assert not (tmp_path / "new").exists()


def test_a_run_has_all_cores_and_so_has_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = []
    before = torch.get_num_threads()

    def measured(device: torch.device) -> ProductSpeed:
        threads.append(torch.get_num_threads())
        return ProductSpeed(1e9, 2e9)

    monkeypatch.setattr(diagnosis, "measure_products", measured)
    found = diagnose(tmp_path, network=False)
    assert threads[0] == found["cores"]
    assert torch.get_num_threads() == before
    assert found["devices"][0]["precision_auto"] == "bf16"


def test_a_device_that_does_not_work_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(device: torch.device) -> ProductSpeed:
        raise RuntimeError("no kernel image\nlong story")

    monkeypatch.setattr(diagnosis, "measure_products", broken)
    found = diagnose(tmp_path, network=False)
    assert found["devices"][0]["problem"] == "no kernel image"
    assert "cpu is there but does not work: no kernel image" in found["notes"]


def test_little_or_locked_disk_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis, "LITTLE_DISK_BYTES", 2**60)
    assert any("--output" in note for note in diagnose(tmp_path, network=False)["notes"])
    monkeypatch.setattr(diagnosis.os, "access", lambda place, mode: False)
    assert any(
        "cannot be written" in note and "BLOCKLLM_CACHE" in note for note in diagnose(tmp_path, network=False)["notes"]
    )


def test_credentials_are_found_where_their_libraries_look(bare_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_key()
    assert not has_hub_token()
    (bare_home / ".netrc").write_text("machine elsewhere login a password b\n", encoding="utf-8")
    assert not has_wandb_key()
    (bare_home / ".netrc").write_text("machine api.wandb.ai login user password s\n", encoding="utf-8")
    assert has_wandb_key()
    (bare_home / ".netrc").write_text("machine\n", encoding="utf-8")
    assert not has_wandb_key()
    token = bare_home / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("", encoding="utf-8")
    assert not has_hub_token()
    token.write_text("s", encoding="utf-8")
    assert has_hub_token()
    monkeypatch.setenv("HF_HOME", str(bare_home / "elsewhere"))
    assert not has_hub_token()


class NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setenv("NO_PROXY", "*")
    return lambda url: monkeypatch.setenv("HF_ENDPOINT", url)


def test_any_answer_of_the_hub_is_one(endpoint: Callable[[str], None]) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        assert probe_hub()["reachable"] is True
        server.shutdown()
    refused = probe_hub()
    assert refused["reachable"] is False
    assert "127.0.0.1" in refused["detail"]


def test_an_answer_that_is_no_http_is_none(endpoint: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"babble\r\n\r\n")

        babbling = threading.Thread(target=babble, daemon=True)
        babbling.start()
        endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}")
        found = probe_hub()
        babbling.join()
    assert found["reachable"] is False
    assert "babble" in found["detail"]


def test_a_hub_that_does_not_answer_costs_no_more_than_the_limit(endpoint: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = probe_hub(timeout=0.2)
    assert found["reachable"] is False


def test_a_name_look_up_that_hangs_is_within_the_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    test_is_over = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        test_is_over.wait(60)
        raise OSError

    monkeypatch.setattr(diagnosis.urllib.request, "urlopen", hang)
    found = probe_hub(timeout=0.1)
    test_is_over.set()
    assert found == {"reachable": False, "detail": "https://huggingface.co: no answer within 0.1 s"}


@pytest.mark.parametrize("url", ["not an address", "file:///etc/hostname", "http://[", "http://127.0.0.1:99999"])
def test_an_odd_address_is_no_answer(endpoint: Callable[[str], None], url: str) -> None:
    endpoint(url)
    assert probe_hub()["reachable"] is False


def test_offline_by_choice_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = diagnose(tmp_path, network=True)
    assert found["hub"] == {"reachable": False, "detail": "HF_HUB_OFFLINE is set"}
    assert any("builtin" in note for note in found["notes"])
