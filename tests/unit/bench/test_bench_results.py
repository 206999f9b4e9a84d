"""What results come to: spread, ratios, limits, slopes; what is stored; what goes into a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speed import page
from speed.cases import OURS
from speed.figures import fastest_peer, slope, spread
from speed.results import FOLDER, CaseResult, Outcome, SectionResult, load, store
from speed.sections import SECTIONS, blockllm

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "memory_bytes": 2**34,
    "torch": "2.13.0",
    "mkl": "2024.2",
    "onednn": "3.11",
    "commit": "0123456789abcdef",
    "is_changed": False,
}


def outcome(*walls: float, peer: str = OURS, kind: str = "", **facts: Any) -> Outcome:
    repeats = [{"wall": wall, "cpu": wall / 2, "step": step} for step, wall in enumerate(walls, 1)]
    return Outcome(peer=peer, kind=kind, repeats=repeats, facts=facts)


def section(cases: dict[str, CaseResult], **more: Any) -> SectionResult:
    values: dict[str, Any] = {"when": "2026-01-02T03:04:05+00:00", "seconds": 1, "command": "--only dense", **more}
    return SectionResult(**values, machine=MACHINE, threads=2, cases=cases)


def dense_case() -> CaseResult:
    return CaseResult(
        work=1000,
        unit="tokens",
        outcomes={
            "ours, fp32": outcome(2.0, 2.0, 2.0, kind="fp32"),
            "ours, bf16": outcome(0.5, 0.4, 0.6, kind="bf16"),
            "transformers, fp32": outcome(3.0, 3.0, peer="transformers", kind="fp32"),
            "transformers, bf16": outcome(1.0, 1.1, 0.9, peer="transformers", kind="bf16"),
            "plain torch, bf16": outcome(0.9, 0.8, 0.7, peer="torch", kind="bf16"),
            "litgpt, bf16": Outcome(peer="litgpt", kind="bf16", state="absent", reason="make bench-setup"),
        },
    )


def test_spread_is_of_the_clock_that_is_asked_for() -> None:
    found = spread(outcome(1.0, 2.0, 3.0, 4.0, 5.0))
    assert (found.least, found.lower, found.median, found.upper, found.most, found.count) == (1, 2, 3, 4, 5, 5)
    assert spread(outcome(1.0, 2.0, 3.0), "cpu").median == 1
    assert spread(outcome(4.0)).upper == 4


def test_the_fastest_peer_is_of_its_kind_and_never_ourselves() -> None:
    case = dense_case()
    assert fastest_peer(case, OURS, "fp32") == "transformers, fp32"
    assert fastest_peer(case, OURS, "bf16") == "plain torch, bf16"
    assert fastest_peer(case, OURS) == "plain torch, bf16"
    assert fastest_peer(CaseResult(work=1, unit="", outcomes={"ours": outcome(1.0)}), OURS) is None


def test_the_dense_table_has_ratios_and_who_is_missing() -> None:
    table = SECTIONS["dense"].table(section({"60m": dense_case()}), "wall")
    best = "| 60m | each at its best | ours, bf16 | 2,000 | plain torch, bf16 | 1,250 | 1.60 |"
    assert best in table.splitlines()
    assert "| 60m | fp32 | ours, fp32 | 500 | transformers, fp32 | 333 | 1.50 |" in table.splitlines()
    assert "litgpt, bf16: absent, make bench-setup" in table


def test_a_power_law_has_its_exponent_as_slope() -> None:
    assert slope({1: 3.0, 2: 12.0, 4: 48.0}) == pytest.approx(2)
    with pytest.raises(ValueError, match="two points"):
        slope({1: 3.0})


def test_updates_that_probe_count_as_often_as_they_come() -> None:
    every = blockllm.probe_every("1 of 8 layers")
    assert every == 5
    assert blockllm.probe_every("adamw") == blockllm.probe_every(blockllm.BASE) == 1
    probing_in_fifth = outcome(1.0, 1.2, 1.0, 1.0, 6.0, 1.0, 1.0, 1.0, 1.0, 5.0)
    assert blockllm.fastest(probing_in_fifth, every) == pytest.approx((5.0 + 4 * 1.0) / 5)
    assert blockllm.fastest(outcome(2.0, 1.5), every) == 1.5


@pytest.mark.parametrize(("seconds", "met"), [(0.549, "yes"), (0.551, "NO")])
def test_the_limit_is_nine_tenths_of_what_untrained_entries_could_save(seconds: float, met: str) -> None:
    case = CaseResult(
        work=1,
        unit="tokens",
        outcomes={
            "adamw": outcome(1.0),
            "frozen": outcome(0.5),
            "tensor, s 0.99": Outcome(
                peer=OURS,
                repeats=[{"wall": seconds, "cpu": 1.0, "step": 1, "untrained": 1.0}],
            ),
        },
    )
    table = SECTIONS["blockllm"].table(section({"fp32": case}), "wall")
    row = next(line for line in table.splitlines() if line.startswith("| tensor, s 0.99"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:8] == ["1.000", "0.550", f"{(1 - seconds) / 0.5:.2f}", met]


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "results" / "here.json"
    store(path, "dense", section({"60m": dense_case()}))
    store(path, "loss", section({}, reason="first"))
    store(path, "loss", section({}, reason="second"))
    found = load(path)
    assert list(found.sections) == ["dense", "loss"]
    assert found.sections["loss"].reason == "second"
    assert found.sections["dense"].cases["60m"] == dense_case()
    assert json.loads(path.read_text())["sections"]["dense"]["machine"] == MACHINE


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"sections": {"dense": {"threads": 2}}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)x\.json.*sections\.dense\.when"):
        load(path)


def test_the_pages_of_docs_are_what_the_kept_results_make() -> None:
    assert page.write(page.PAGES, FOLDER, check=True) == 0


def test_pages_get_their_tables_between_markers(tmp_path: Path) -> None:
    store(tmp_path / "here.json", "dense", section({"60m": dense_case()}))
    written = tmp_path / "page.md"
    written.write_text("Before.\n<!-- bench here dense -->\nold\n<!-- /bench -->\nAfter.\n", encoding="utf-8")
    assert page.write([written], tmp_path, check=True) == 1
    assert "old" in written.read_text()
    assert page.write([written], tmp_path, check=False) == 0
    text = written.read_text()
    assert text.startswith("Before.\n<!-- bench here dense -->\n| model")
    assert text.endswith("<!-- /bench -->\nAfter.\n")
    assert "a processor, 2 thread(s) of 2 core(s), 16 GiB, torch 2.13.0" in text
    assert "old" not in text
    assert page.write([written], tmp_path, check=True) == 0
    written.write_text("<!-- bench here loss -->\n<!-- /bench -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no section 'loss'"):
        page.write([written], tmp_path, check=False)


@pytest.mark.parametrize(
    "text", ["<!-- bench here dense -->\ntext\n", "<!-- /bench -->\n", "<!-- bench here -->\n<!-- /bench -->\n"]
)
def test_a_marker_that_stands_alone_swallows_no_text(text: str, tmp_path: Path) -> None:
    store(tmp_path / "here.json", "dense", section({"60m": dense_case()}))
    written = tmp_path / "page.md"
    text += "kept\n<!-- bench here dense -->\n<!-- /bench -->\n"
    written.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: a marker stands alone"):
        page.write([written], tmp_path, check=False)
    assert written.read_text() == text


@pytest.mark.parametrize("word", ["save", "load"])
def test_the_checkpoint_table_needs_only_the_case_that_was_measured(word: str) -> None:
    name = next(case.name for case in SECTIONS["checkpoint"].cases() if word in case.name)
    outcomes = {word: outcome(2.0, bytes=10**9), f"torch.{word}": outcome(1.0, bytes=10**9)}
    table = SECTIONS["checkpoint"].table(section({name: CaseResult(work=0, unit="bytes", outcomes=outcomes)}), "wall")
    assert f"to torch.{word} |" in table
    assert "| 0.50 | 2.00 |" in table


def test_choosing_is_what_a_probe_and_a_selection_take_beyond_an_update() -> None:
    # A probe each 14 of an update's 56 blocks is 13 more than the usual one; a selection comes after 100 updates.
    case = CaseResult(
        work=1,
        unit="tokens",
        outcomes={
            "adamw": outcome(2.0),
            "frozen": outcome(0.5),
            blockllm.BASE: outcome(1.0),
            "probing": outcome(1.0 + 13 * 0.004),
            "selecting": outcome(1.5),
        },
    )
    table = SECTIONS["blockllm"].table(section({"fp32": case}), "wall")
    case.outcomes["selecting"] = outcome(0.5)
    assert "Together 0.40% (" in SECTIONS["blockllm"].table(section({"fp32": case}), "wall")
    assert "A probe takes 4.0 ms, one in 1 update(s): 0.40% of the time." in table
    assert "A selection takes 500 ms, at most one in 100 updates: 0.50%. Together 0.90% (below 1%: yes)." in table


def test_the_share_of_bandwidth_is_of_medians() -> None:
    amounts = {"bytes": 10**9}
    case = CaseResult(
        work=0,
        unit="",
        outcomes={
            "copy of memory": outcome(0.5, 0.5, 0.1, peer="torch", **amounts),
            "sum in place": outcome(0.25, 0.25, 0.1, peer="torch", **amounts),
            "ours adamw, fp32": outcome(1.0, 1.0, 0.1, **amounts, entries=10**8),
        },
    )
    table = SECTIONS["update"].table(section({"whole": case}), "wall")
    row = next(line for line in table.splitlines() if line.startswith("| ours adamw"))
    assert row.endswith("| 100 | 1.0 | 50% | 25% |")
