import os
import signal
import subprocess
import sys

import pytest

from blockllm_cli.training.signals import StopFlag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal_number == number
    assert signal.getsignal(number) is before
    assert "once more to leave at once" in capfd.readouterr().err


def test_a_second_signal_leaves_at_once_r11():
    program = (
        "import os, signal\n"
        "from blockllm_cli.training.signals import StopFlag\n"
        "with StopFlag():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
