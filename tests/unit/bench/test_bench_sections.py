"""What the sections ask for: workers and peers that exist, labels that tell contestants apart, time that is kept to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import speed
from speed.cases import OURS, Case, Choice, Contestant, Section
from speed.driver import _command, main, measure
from speed.results import CaseResult, SectionResult
from speed.sections import SECTIONS, dense, scripts

BENCH = Path(speed.__file__).parents[1]
PEERS = {path.stem for path in (BENCH / "peers").glob("*.txt")}
CASES = [(name, case) for name, section in SECTIONS.items() for case in section.cases()]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[f"{name}: {case.name}" for name, case in CASES])
def test_every_contestant_can_be_told_apart_and_started(case: Case) -> None:
    labels = [each.label for each in case.contestants]
    assert len(set(labels)) == len(labels)
    for each in case.contestants:
        assert (BENCH / "speed" / "workers" / f"{each.worker}.py").is_file()
        assert each.peer == OURS or each.peer in PEERS


def test_every_peer_has_the_same_torch_and_is_asked_something() -> None:
    pins = {next(line for line in _lines(peer) if line.startswith("torch==")) for peer in PEERS}
    assert len(pins) == 1
    assert {each.peer for _, case in CASES for each in case.contestants} == PEERS | {OURS}


def _lines(peer: str) -> list[str]:
    lines = (BENCH / "peers" / f"{peer}.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if not line.startswith("#")), peer
    return lines


def test_workers_of_peers_need_nothing_of_this_package() -> None:
    for worker in {each.worker for _, case in CASES for each in case.contestants if each.peer != OURS}:
        tree = ast.parse((BENCH / "speed" / "workers" / f"{worker}.py").read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [module for module in imported if module.startswith("blockllm_cli")], worker
        assert {module for module in imported if module.startswith("speed")} <= {
            "speed.workers.protocol",
            "speed.workers.rows",
            "speed.workers.plain_model",
            "speed.workers.llama",
        }


def test_by_default_the_dense_section_leaves_out_what_is_never_fastest() -> None:
    found = dense.cases()
    usual = [case for case in found if all(each.is_default for each in case.contestants)]
    assert [case.name for case in usual[:3]] == ["60m, 4 x 256", "60m, 4 x 1024", "60m, 16 x 256"]
    assert len(usual) == 5
    assert not [each for case in found if case not in usual for each in case.contestants if each.is_default]
    assert all(each.kind in ("fp32", "bf16") for case in found for each in case.contestants)


def test_the_pipeline_without_text_says_so() -> None:
    result = measure(scripts.DATA, Choice(), 0, 1, _never)
    assert "needs --data" in scripts.DATA.table(result, "wall")


def _never(contestant: Contestant) -> None:
    raise AssertionError(contestant)


def test_a_sitting_measures_what_was_chosen_and_stores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(result: SectionResult, clock: str) -> str:
        return ", ".join(f"{name}: {', '.join(case.outcomes)}" for name, case in result.cases.items())

    def cases() -> list[Case]:
        usual = Contestant("usual", "litgpt", "lit", {})
        rare = Contestant("rare", "litgpt", "lit", {}, is_default=False)
        return [Case(name, (usual, rare)) for name in ("one", "two")]

    monkeypatch.setitem(SECTIONS, "loss", Section("loss", "what is asked for", table, cases))
    shared = ["--only", "loss", "--results", str(tmp_path), "--peers", str(tmp_path), "--name", "here"]
    assert main([*shared, "--minutes", "0"]) == 0
    assert "one: usual, two: usual" in capsys.readouterr().out
    assert main([*shared, "--case", "two", "--all"]) == 0
    assert "two: usual, rare" in capsys.readouterr().out
    stored = SectionResult.model_validate(_stored(tmp_path)["loss"])
    assert stored.command.endswith("--case two --all")
    assert isinstance(stored.cases["two"], CaseResult)
    assert {each.state for each in stored.cases["two"].outcomes.values()} == {"absent"}
    assert stored.machine["torch"]


def _stored(place: Path) -> dict[str, object]:
    from speed.results import load

    return {name: section.model_dump() for name, section in load(place / "here.json").sections.items()}


def test_a_case_that_is_nowhere_is_refused_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--results", str(tmp_path), "--peers", str(tmp_path), "--name", "here"]
    with pytest.raises(SystemExit) as ended:
        main([*shared, "--case", "no such case"])
    assert ended.value.code == 2
    assert "no case of these sections has 'no such case' in its name" in capsys.readouterr().err
    assert not (tmp_path / "here.json").exists()


def test_results_that_cannot_be_read_end_a_sitting_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases() -> list[Case]:
        raise AssertionError

    monkeypatch.setitem(SECTIONS, "loss", Section("loss", "", lambda result, clock: "", cases))
    (tmp_path / "here.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["--only", "loss", "--results", str(tmp_path), "--name", "here"])
    assert ended.value.code == 1
    assert "here.json" in capsys.readouterr().err
    assert (tmp_path / "here.json").read_text() == "{"


def test_a_command_is_kept_as_a_shell_takes_it_without_folders_of_the_machine() -> None:
    words = ["--case", "60m, 4 x 256", "--data", "/home/me/text", "--results=/tmp/x", "--all"]
    assert _command(words) == "--case '60m, 4 x 256' --data DATA --results=RESULTS --all"


def test_peers_that_do_not_exist_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import setup_peers

    monkeypatch.setattr("sys.argv", ["setup_peers.py", "litgtp"])
    with pytest.raises(SystemExit) as ended:
        setup_peers.main()
    assert ended.value.code == 2
    assert "no peer 'litgtp': there are galore, litgpt" in capsys.readouterr().err
