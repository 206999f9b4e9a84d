import json

import pytest
import torch

from blockllm_cli.errors import DivergedError, InputError, StorageError
from blockllm_cli.model import weights
from blockllm_cli.training.checkpoint import find_checkpoint, open_checkpoint, save_checkpoint, steps_on_disk


def save(folder, step, value=1.0, keep=2):
    return save_checkpoint(
        folder,
        step=step,
        weights={"a.weight": torch.full((3, 4), value, dtype=torch.bfloat16)},
        method_state={"a.weight.exp_avg": torch.arange(12.0).reshape(3, 4), "step": step},
        state={"tokens": 10 * step},
        keep=keep,
    )


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    assert [each.name for each in steps_on_disk(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    found = find_checkpoint(tmp_path, fall_back=False)
    assert found.step == 3
    assert found.state["tokens"] == 30
    assert found.weights()["a.weight"].dtype == torch.bfloat16
    assert torch.equal(found.weights()["a.weight"], torch.full((3, 4), 3.0, dtype=torch.bfloat16))
    assert dict(found.method()).keys() == {"a.weight.exp_avg", "step"}
    assert found.method()["step"] == 3


def test_every_file_opens_with_a_safe_loader_r09(tmp_path):
    folder = save(tmp_path, 1)
    assert {each.suffix for each in folder.iterdir()} == {".safetensors", ".json"}
    for each in folder.glob("*.json"):
        json.loads(each.read_text())


def test_a_save_cut_short_leaves_the_old_ones_r10(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "sync_file", no_space)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, 2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert find_checkpoint(tmp_path, fall_back=False).step == 1


def test_rests_of_a_killed_save_are_swept(tmp_path):
    rest = tmp_path / ".step-00000001.4711.tmp"
    rest.mkdir()
    (rest / "weights.safetensors").write_bytes(b"half")
    save(tmp_path, 2)
    assert not rest.exists()


def test_a_sound_checkpoint_of_the_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    folder = save(tmp_path, 1)
    before = (folder / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 1)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert save(tmp_path, 1) == folder
    assert open_checkpoint(folder).step == 1
    assert (tmp_path / ".damaged-step-00000001" / "weights.safetensors").read_bytes() == b"damaged"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    path = newest / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors.*latest-good.*--step 1"):
        find_checkpoint(tmp_path, fall_back=False)
    assert find_checkpoint(tmp_path, fall_back=True).step == 1


def test_all_damaged_is_an_error_even_when_falling_back(tmp_path):
    (save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"no older checkpoint"):
        find_checkpoint(tmp_path, fall_back=True)


def test_weights_that_are_not_finite_are_never_saved_r15(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(DivergedError, match=r"update 2 left a\.weight"):
        save(tmp_path, 2, float("inf"))
    assert [each.name for each in steps_on_disk(tmp_path)] == ["step-00000001"]


def test_a_newer_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        open_checkpoint(folder)


def test_no_checkpoint_is_none(tmp_path):
    assert find_checkpoint(tmp_path / "checkpoints", fall_back=False) is None


def test_size_does_not_grow_r12(tmp_path):
    sizes = {sum(f.stat().st_size for f in save(tmp_path, step).glob("*.safetensors")) for step in (1, 2, 3)}
    assert len(sizes) == 1
