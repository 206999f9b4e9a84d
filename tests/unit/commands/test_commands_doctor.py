"""`blockllm doctor`: says what there is, in bounded time, and tells no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockllm_cli import app
from blockllm_cli.commands import diagnosis
from blockllm_cli.commands.diagnosis import diagnose, has_hub_token, has_wandb_key, probe_hub
from blockllm_cli.training.precision import ProductSpeed
from support.hub import Hub

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


def test_the_hub_is_asked_once_and_told_of(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe_hub()
    assert found["reachable"] is True
    assert found["detail"].startswith(f"{hub.url} answered in ")
    assert hub.requests == ["HEAD /"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.replace("://", "://user:a-secret@"))
    found = probe_hub()
    assert found["reachable"] is True
    assert "secret" not in found["detail"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused = probe_hub()
    assert refused["reachable"] is False
    assert "127.0.0.1" in refused["detail"]


def test_offline_by_choice_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = diagnose(tmp_path, network=True)
    assert found["hub"] == {"reachable": False, "detail": "HF_HUB_OFFLINE is set"}
    assert any("builtin" in note for note in found["notes"])
