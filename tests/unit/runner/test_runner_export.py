"""The export is the model (R35): by transformers the same logits, the same text, the same perplexity."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blockllm_cli.app import main
from blockllm_cli.data.tokenizer import load_tokenizer
from blockllm_cli.errors import GuardError, InputError, InterruptedRunError, RecipeError, StorageError
from blockllm_cli.methods import registry
from blockllm_cli.methods.adamw import AdamW
from blockllm_cli.methods.registry import method_names
from blockllm_cli.model.generation import generate
from blockllm_cli.runner import export as under_test
from blockllm_cli.runner.export import Exported, ExportRequest, export_run
from blockllm_cli.runner.finished import generate_text, opened_run
from blockllm_cli.tracking.terminal import Terminal
from support.hf import random_ids, transformers_logits
from support.tiny import Result

SHORT = ("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3", "model.initializer_range=0.15")


def exported(run: Result, to: Path, **changed) -> Exported:
    with Terminal(Console(file=io.StringIO(), width=200)) as terminal:
        return export_run(ExportRequest(run.folder, to, **changed), terminal)


def our_logits(run: Result, ids: torch.Tensor) -> torch.Tensor:
    with opened_run(run.folder, step=None) as opened, torch.inference_mode():
        return opened.model.float()(ids)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.num_key_value_heads=2", "model.rope_theta=500000.0", "model.rms_norm_eps=1e-5"),
        ("model.tie_word_embeddings=true",),
        ("run.precision=bf16", "model.num_key_value_heads=1"),
    ],
)
def test_transformers_computes_the_same_logits_r35(tiny, tmp_path, changes):
    pytest.importorskip("transformers")
    run = tiny.run(*SHORT, *changes)
    done = exported(run, tmp_path / "model")
    ids = random_ids()
    ours = our_logits(run, ids)
    assert ours.abs().max() > 1  # logits near zero would all be equal to 1e-5
    torch.testing.assert_close(transformers_logits(done.folder, ids), ours, rtol=0, atol=1e-5)
    assert done.dtype == ("bf16" if "run.precision=bf16" in changes else "fp32")
    found = done.comparison
    assert found.stored_difference == 0
    assert found.transformers_difference < 1e-5
    assert found.largest_logit > 1
    assert (found.texts_different, found.texts) == (0, 73)


@pytest.mark.parametrize("method", method_names())
def test_each_method_exports_what_it_trained_r35(tiny, tmp_path, method):
    pytest.importorskip("transformers")
    run = tiny.run(*SHORT, method=method)
    exported(run, tmp_path / "model")
    ids = random_ids()
    torch.testing.assert_close(transformers_logits(tmp_path / "model", ids), our_logits(run, ids), rtol=0, atol=1e-5)


def test_the_vocabulary_rounded_up_and_greedy_text_r35(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    recipe = tiny.recipe.read_text().replace("vocab_size = 320\n", "")
    tiny.recipe.write_text(recipe)
    run = tiny.run("schedule.steps=30", "model.tie_word_embeddings=true")
    exported(run, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.get_input_embeddings().weight.shape == (320, 32)  # 300 pieces, and the next multiple of 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    given = tokenizer("Document 12 begins.", return_tensors="pt")
    theirs = model.generate(**given, max_new_tokens=24, do_sample=False)[0].tolist()
    with opened_run(run.folder, step=None) as opened:
        ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(["Document 12 begins."])[0].tolist()]
        assert given.input_ids[0].tolist() == ids
        made = generate(opened.model, ids, max_new_tokens=24, temperature=0, stop_id=opened.tokenizer.eos_id)
        assert [piece for piece in theirs[len(ids) :] if piece != tokenizer.eos_token_id] == made
        text = generate_text(opened, "Document 12 begins.", max_new_tokens=24, temperature=0, top_k=None, seed=0)
    assert tokenizer.decode(theirs, skip_special_tokens=True) == text


def test_the_perplexity_is_the_runs_r35(tiny, tmp_path):
    """All of it by other hands: their tokenizer, their model, a sum written here."""
    transformers = pytest.importorskip("transformers")
    run = tiny.run(*SHORT, "data.layout=truncate", "evaluate.tokens=100000")
    exported(run, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    total, count = 0.0, 0
    for line in (tiny.corpus / "validation.jsonl").read_text("utf-8").splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"]).input_ids[:31], tokenizer.eos_token_id]])
        with torch.inference_mode():
            total += model(ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert math.exp(total / count) == pytest.approx(run.summary["perplexity"], rel=1e-5)


def test_the_tokenizer_that_transformers_loads_is_ours(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = tiny.run(*SHORT)
    exported(run, tmp_path / "model")
    ours, theirs = load_tokenizer(tiny.tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.model_max_length == 32
    texts = ["", "  Document  7\n\tbegins ", "</s> \u2581 \U0001f600 naïve", "The river"]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert theirs(text).input_ids == [1, *ids.tolist()]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text.replace("\u2581", " ")
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == tiny.tokenizer.read_bytes()


def test_rows_without_an_opening_are_told_to_the_tokenizer_and_to_generate(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = tiny.run(*SHORT, "data.layout=truncate")
    exported(run, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    (ids,) = load_tokenizer(tiny.tokenizer).encode(["The river"])
    assert theirs("The river").input_ids == ids.tolist()
    with opened_run(run.folder, step=None) as opened:
        made = generate(opened.model, ids.tolist(), max_new_tokens=8, temperature=0, stop_id=2)
        text = generate_text(opened, "The river", max_new_tokens=8, temperature=0, top_k=None, seed=0)
    assert text == load_tokenizer(tiny.tokenizer).decode([*ids, *made])


def test_a_tokenizer_json_is_exported_as_it_came(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    first = exported(tiny.run(*SHORT), tmp_path / "first")
    run = tiny.run(*SHORT, f"tokenizer.path={first.folder / 'tokenizer.json'}")
    second = exported(run, tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (tmp_path / "first" / "tokenizer.json").read_bytes()
    assert "tokenizer.model" not in second.files
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert second.comparison.texts_different == 0


@pytest.mark.parametrize(("layout", "opening"), [("pack", [1]), ("truncate", [])])
def test_a_tokenizer_json_opens_a_text_as_rows_were(tiny, tmp_path, layout, opening):
    """Whatever its own post-processor does, and where it has no token of its own for a beginning."""
    transformers = pytest.importorskip("transformers")
    first = exported(tiny.run(*SHORT), tmp_path / "first")
    source = tmp_path / "source"
    source.mkdir()
    content = json.loads((first.folder / "tokenizer.json").read_text("utf-8"))
    content["post_processor"] = None if layout == "pack" else content["post_processor"]
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    marks = {"eos_token": "<s>"} if layout == "pack" else {"bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(marks), encoding="utf-8")
    run = tiny.run(*SHORT, f"tokenizer.path={source / 'tokenizer.json'}", f"data.layout={layout}")
    second = exported(run, tmp_path / "second")
    (ids,) = load_tokenizer(run.folder / "tokenizer.model").encode(["The river"])
    theirs = transformers.AutoTokenizer.from_pretrained(second.folder)
    assert theirs("The river").input_ids == [*opening, *ids.tolist()]
    assert theirs.bos_token_id == 1


def test_a_link_stays_a_link_and_files_are_for_whoever_the_umask_lets(tiny, tmp_path):
    run = tiny.run(*SHORT)
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    for overwrite in (False, True):
        done = exported(run, tmp_path / "link", overwrite=overwrite)
    assert (tmp_path / "link").is_symlink()
    assert (there / "config.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    modes = {path.name: path.stat().st_mode for path in done.folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_earlier_export_comes_back_where_the_new_one_cannot_take_its_place(tiny, tmp_path, monkeypatch):
    run = tiny.run(*SHORT)
    done = exported(run, tmp_path / "model")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == ".model.tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StorageError):
        exported(run, tmp_path / "model", overwrite=True)
    assert {path.name for path in done.folder.iterdir()} == set(done.files)


def test_another_dtype_is_written_and_its_difference_told(tiny, tmp_path):
    run = tiny.run(*SHORT)
    done = exported(run, tmp_path / "model", dtype="bf16", step=6)
    assert done.dtype == "bf16"
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1e-5 < done.comparison.stored_difference < 0.5
    assert done.files["model.safetensors"] < 2 * done.parameters + 4000


def test_large_weights_are_cut_into_files(tiny, tmp_path):
    pytest.importorskip("transformers")
    run = tiny.run(*SHORT)
    done = exported(run, tmp_path / "model", shard_bytes=30_000)
    assert sum(name.endswith(".safetensors") for name in done.files) > 3
    ids = random_ids()
    torch.testing.assert_close(transformers_logits(done.folder, ids), our_logits(run, ids), rtol=0, atol=1e-5)


def test_the_card_has_recipe_numbers_hashes_and_licence(tiny, tmp_path):
    run = tiny.run(*SHORT, "checkpoint.every=3")
    exported(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| validation perplexity | {run.summary['perplexity']:.4f} |" in card
    for key in ("train_rows_sha256", "validation_sha256", "tokenizer_sha256", "recipe_sha256"):
        assert run.summary[key] in card
    assert (run.folder / "recipe.toml").read_text().strip() in card
    assert "Apache-2.0" in card
    assert "licence of these weights is for whoever trained them" in card
    exported(run, tmp_path / "earlier", step=3)
    earlier = (tmp_path / "earlier" / "README.md").read_text(encoding="utf-8")
    assert "after update 3" in earlier
    assert "validation perplexity" not in earlier  # those of update 6 are not its own


def test_it_works_without_the_packages_of_hugging_face(tiny, tmp_path, monkeypatch):
    run = tiny.run(*SHORT)
    for name in ("transformers", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    done = exported(run, tmp_path / "model")
    assert (done.comparison.transformers, done.comparison.tokenizers) == (None, None)
    assert done.comparison.stored_difference == 0
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= done.files.keys()


def test_a_folder_with_something_in_it_is_left_alone(tiny, tmp_path):
    run = tiny.run(*SHORT)
    taken = tmp_path / "taken"
    (taken / "inside").mkdir(parents=True)
    with pytest.raises(RecipeError, match="not empty; name another, or replace it with --overwrite"):
        exported(run, taken)
    with pytest.raises(RecipeError, match="holds something else"):
        exported(run, taken, overwrite=True)
    with pytest.raises(RecipeError, match="there is a file of this name"):
        exported(run, tiny.recipe)
    with pytest.raises(RecipeError, match="holds something else"):
        exported(run, run.folder, overwrite=True)
    (taken / "inside").rmdir()
    assert exported(run, taken).folder == taken
    (taken / "README.md").write_text("old")
    exported(run, taken, overwrite=True)
    assert (taken / "README.md").read_text() != "old"
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("foreign", ["notes.md", "train.py", "checkpoints/", "model/"])
def test_overwrite_never_takes_what_no_export_wrote(tiny, tmp_path, foreign):
    run = tiny.run(*SHORT)
    folder = exported(run, tmp_path / "model").folder
    (folder / foreign).mkdir() if foreign.endswith("/") else (folder / foreign).write_text("mine")
    with pytest.raises(RecipeError, match=rf"holds something else \({foreign.strip('/')}\)"):
        exported(run, folder, overwrite=True)
    assert (folder / foreign).exists()


class Wrong(AdamW):
    """AdamW that merges once too often, as an adapter might, or keeps the merge in its state."""

    name = "wrong"

    def merged_weights(self, model):
        # Its state has been put back: AdamW's count of updates is what it was.
        assert max(int(value) for name, value in self.state_dict().items() if name.endswith("step")) == 6
        return {name: weight * 2 for name, weight in super().merged_weights(model).items()}


@pytest.fixture
def with_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("wrong", f"{__name__}:Wrong", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == registry.GROUP else [])


@pytest.mark.usefixtures("with_wrong")
def test_the_weights_are_those_the_method_merges(tiny, tmp_path):
    from safetensors.torch import load_file

    run = tiny.run(*SHORT, method="wrong")
    exported(run, tmp_path / "model")
    stored, trained = load_file(tmp_path / "model" / "model.safetensors"), run.tensors()
    assert stored.keys() == trained.keys()
    for name, weight in trained.items():
        assert torch.equal(stored[name], 2 * weight)


def changed_weight(folder: Path, *_, **__) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 2**-20
    save_file(tensors, path, {"format": "pt"})


def changed_config(folder: Path, *_, **__) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("10000.0", "10001.0"))


@pytest.mark.parametrize(
    ("part", "spoil", "words"),
    [
        ("write_weights", changed_weight, "'model.norm.weight' is not what the run has"),
        ("write_configs", changed_config, "is not that of the run"),
    ],
)
def test_what_is_not_the_model_does_not_stay_r35(tiny, tmp_path, monkeypatch, part, spoil, words):
    run = tiny.run(*SHORT)
    write = getattr(under_test, part)

    def written_then_spoilt(*arguments, **named):
        write(*arguments, **named)
        spoil(*arguments)

    monkeypatch.setattr(under_test, part, written_then_spoilt)
    with pytest.raises(GuardError, match=words):
        exported(run, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_another_reading_by_transformers_is_refused_r35(tiny, tmp_path, monkeypatch, factor):
    pytest.importorskip("transformers")
    run = tiny.run(*SHORT)
    from blockllm_cli.runner import export_check

    theirs = export_check._transformers_logits
    monkeypatch.setattr(
        export_check,
        "_transformers_logits",
        lambda folder, ids: (theirs(folder, ids)[0], theirs(folder, ids)[1] * factor),
    )
    with pytest.raises(GuardError, match="computes other logits"):
        exported(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("happens", "expected", "words"),
    [(full_disk, StorageError, r"No space left.*with --to"), (interrupted, InterruptedRunError, "nothing was written")],
)
def test_a_full_disk_or_a_stop_leaves_what_was_there(tiny, tmp_path, monkeypatch, happens, expected, words):
    run = tiny.run(*SHORT)
    exported(run, tmp_path / "out" / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()}
    monkeypatch.setattr(under_test, "write_tokenizer", happens)
    with pytest.raises(expected, match=words):
        exported(run, tmp_path / "out" / "model", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()} == before


def test_a_run_that_is_not_there(tmp_path):
    with (
        pytest.raises(InputError, match="is not a folder; name the folder of a run"),
        Terminal(Console(file=io.StringIO())) as terminal,
    ):
        export_run(ExportRequest(tmp_path / "nowhere", tmp_path / "model"), terminal)
    assert not (tmp_path / "model").exists()


def test_the_command_prints_the_differences_and_the_folder(tiny, tmp_path, capsys):
    run = tiny.run(*SHORT)
    assert main(["export", str(run.folder), "--to", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "model")
    assert re.search(r"difference by the stored type +0\.00e\+00", out)
    assert main(["export", str(run.folder), "--to", str(tmp_path / "model")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(run.folder), "--to", str(tmp_path / "model"), "--overwrite", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(tmp_path / "model")
    assert printed["comparison"]["stored_difference"] == 0
    assert printed["files"].keys() == {path.name for path in (tmp_path / "model").iterdir()}
