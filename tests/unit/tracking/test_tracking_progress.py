import pytest

from blockllm_cli.tracking.progress import Step, Training, row_line


def step(done=0.0, total=None, unit="", description="tokenising"):
    made = Step(description, total, unit, started=100.0)
    made.update(done)
    return made


@pytest.mark.parametrize(
    ("made", "now", "words"),
    [
        (step(), 112.4, "tokenising: 12.4 s so far"),
        (step(3_500_000, unit="targets"), 110.0, "tokenising: 3,500,000 targets, 10.0 s so far"),
        (step(250, 1000, "rows"), 110.0, "tokenising: 250/1,000 rows, 25 %, 30.0 s left"),
        (step(0, 1000, "rows"), 110.0, "tokenising: 0/1,000 rows, 0 %"),
        (step(3 * 2**20, 2**30, "bytes"), 101.0, "tokenising: 3.00 MiB/1.00 GiB, 0 %, 5 min 40 s left"),
        (step(1000, 1000, "rows"), 110.0, "tokenising: 1,000/1,000 rows, 100 %"),
        (step(1200, 1000, "rows"), 110.0, "tokenising: 1,200/1,000 rows, 100 %"),
        (step(0, 0, "rows"), 110.0, "tokenising: 0 rows, 10.0 s so far"),
    ],
)
def test_words_say_how_far_it_is(made, now, words):
    assert made.words(now) == words


def test_the_last_line_says_what_was_done_and_how_long_it_took():
    assert step(1000, 1000, "rows").conclusion(165.0) == "tokenising: 1,000 rows in 1 min 05 s"
    assert step().conclusion(100.2) == "tokenising: 200 ms"
    assert step(400, 1000, "rows").interruption(110.0) == "tokenising: not finished (400 rows, 10.0 s)"


def test_progress_is_told_as_steps_or_as_a_whole_and_may_learn_its_length():
    made = step(0, None, "files")
    made.advance()
    made.advance(4)
    assert (made.done, made.total, made.share()) == (5, None, None)
    made.update(6, 24)
    assert made.share() == 0.25
    made.update(12)
    assert made.share() == 0.5


def test_lines_come_every_ten_seconds_then_rarer_and_at_least_every_minute_r31():
    patience = [step().patience(100.0 + seconds) for seconds in (0, 60, 300, 600, 1500, 1800, 86_400)]
    assert patience == [10, 10, 10, 20, 50, 60, 60]


def test_time_left_of_training_counts_from_where_this_process_began():
    training = Training(steps=100, step=40, started=0.0)
    assert training.seconds_left(50.0) is None
    assert training.words(50.0) == "training: 40/100 updates done, 50.0 s so far"
    training.step = 50
    assert training.seconds_left(50.0) == 250.0
    assert training.words(50.0) == "training: 50/100 updates done, 50.0 s so far, 4 min 10 s left"


def test_figures_that_are_not_there_are_left_out():
    line = row_line({"step": 3, "train/tokens": 1200, "train/loss": None, "eval/perplexity": 20.0}, 10)
    assert line == "update 3/10  1.2k tokens  perplexity 20.00"
    assert Training(steps=10, step=0, started=0.0).figures(1.0) == [["0/10"]]
