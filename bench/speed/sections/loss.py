"""The loss alone with its backward pass; `bench/loss.py` has peak memory and chunk sizes."""

from __future__ import annotations

from speed.cases import OURS, Case, Contestant, Section
from speed.sections import simple

SHAPES = ((1024, 512, 32000), (4096, 512, 32000), (2048, 256, 4096))
WAYS = ("ours", "plain", "plain, logits as they come")


def cases() -> list[Case]:
    """Each shape in each precision."""
    return [
        Case(
            f"{tokens} tokens, {hidden} wide, {vocab} pieces, {precision}",
            tuple(
                Contestant(
                    way,
                    OURS,
                    "loss_alone",
                    {
                        "tokens": tokens,
                        "hidden_size": hidden,
                        "vocab_size": vocab,
                        "precision": precision,
                        "way": way,
                    },
                )
                for way in WAYS
            ),
            tokens,
            "tokens",
            0.12,
            rounds=(5, 30),
        )
        for tokens, hidden, vocab in SHAPES
        for precision in ("fp32", "bf16")
    ]


SECTION = Section("loss", "the loss alone, forward and backward", simple.page("plain", "tokens"), cases)
