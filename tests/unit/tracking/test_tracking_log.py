import os
import re
import resource
import subprocess
import sys
import time

import pytest

from blockllm_cli.errors import StorageError
from blockllm_cli.tracking.log import RunLog
from blockllm_cli.tracking.plain import printable


def test_each_line_has_its_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "XYZ-02:30")
    time.tzset()
    try:
        log = RunLog(tmp_path / "log.txt")
        log.write("one\ntwo", 1_000_000_000)
        log.close()
    finally:
        monkeypatch.undo()
        time.tzset()
    stamp = "2001-09-09 04:16:40+02:30"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"{stamp}  one\n{stamp}  two\n"


def test_a_line_is_on_disk_when_it_was_written(tmp_path):
    log = RunLog(tmp_path / "log.txt")
    log.write("ä")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("ä\n")
    log.close()


def test_it_appends_and_is_bounded_r31(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("from before\n", encoding="utf-8")
    log = RunLog(path, limit=1000)
    for number in range(200):
        log.write(f"line {number}")
    log.close()
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["log.old.txt", "log.txt"]
    assert all(file.stat().st_size < 1000 + 60 for file in tmp_path.iterdir())
    both = (tmp_path / "log.old.txt").read_text() + path.read_text()
    numbers = [int(number) for number in re.findall(r"line (\d+)", both)]
    assert numbers == list(range(numbers[0], 200))  # the newest, none missing, none twice
    assert len(numbers) > 20


def test_what_would_move_a_cursor_is_spelled_out(tmp_path):
    log = RunLog(tmp_path / "log.txt")
    log.write("file \x1b[31mred\r\x9b name \udcff\tend")
    log.close()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text.endswith("file \\x1b[31mred\\r\\x9b name \\udcff\tend\n")


def test_plain_text_stays_as_it_is():
    assert printable("Größe ▒ 漢字\n\tx") == "Größe ▒ 漢字\n\tx"


def test_a_full_disk_is_a_storage_error(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from blockllm_cli.errors import StorageError\n"
        "from blockllm_cli.tracking.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "try:\n"
        "    for _ in range(100): log.write('x' * 100)\n"
        "except StorageError as error:\n"
        "    log.close(); sys.exit('log.txt' in str(error) and 6)\n"
    )

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log.txt")], preexec_fn=small_files, env=os.environ, timeout=60
    )
    assert done.returncode == 6


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot open .*log\.txt"):
        RunLog(tmp_path / "nowhere" / "log.txt")
