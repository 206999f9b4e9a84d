"""A tokenizer from the corpus itself: a bounded, seeded sample, trained in a process of its own.

The same text, settings and seed give the same pieces and scores on every machine. Nothing of the sample is left out in
silence, which sentencepiece would do with long lines and with lines that hold U+0000 or U+2585: lines are cut at those,
and below its limit. The text is not normalised, so decoding gives back what was encoded.

Training runs in a child process because sentencepiece cannot be interrupted: the child is killed when a stop is asked
for, and it dies with its parent. `python -m blockllm_cli.data.tokenizer_training` is that child.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from blockllm_cli.data.stopping import Progress, StopCheck, never, unheard
from blockllm_cli.durable import storage_errors
from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.units import format_bytes

# Sentencepiece's sums in unigram training depend on the number of threads: one number for every machine.
TRAINER_THREADS = 4
# Share of the sample's characters that get a piece of their own; the rest are spelled in bytes.
CHARACTER_COVERAGE = 0.99995
# unk, bos and eos, and one piece per byte value.
RESERVED_PIECES = 3 + 256
# Beside those, the space and one character.
SMALLEST_VOCABULARY = RESERVED_PIECES + 2
# At most this many times `sample_bytes` are read in search of a sample: a crawl need not be read to its end.
SCAN_FACTOR = 20
# Characters per line of the sample: at most four bytes each, below sentencepiece's limit of 16,384 bytes set here.
LINE_CHARACTERS = 4000
MAX_SENTENCE_BYTES = 16_384
POLL_SECONDS = 0.05

Kind = Literal["bpe", "unigram"]

# Sentencepiece reads lines, and skips, without an error, any that holds U+0000 or its own mark for unknown, U+2585.
_LINE_END = re.compile("[\n\x00\u2585]+")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A new sentencepiece model and how it came about.

    Attributes:
        model_bytes: content of a model file.
        report: plain values: `kind vocab_size seed sample_bytes` as asked; `documents_seen bytes_seen` read in search
            of the sample, `corpus_exhausted` whether that was all there is; `documents_used bytes_used` in the sample,
            `documents_cut` of them not whole; `lines_cut`, lines trained on in several pieces.
    """

    model_bytes: bytes
    report: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Texts to train on, in the order of the corpus, and what `TrainedTokenizer.report` says of them."""

    texts: list[str]
    counts: dict[str, Any]


def draw_sample(
    texts: Iterable[str], *, sample_bytes: int, seed: int, should_stop: StopCheck = never, progress: Progress = unheard
) -> Sample:
    """Choose documents at random until their UTF-8 text is `sample_bytes`; the last one chosen is cut to fit.

    Document i gets the key hash(seed, i), and those of smallest keys are taken: a uniform draw without replacement that
    one pass over the corpus gives, in memory for the sample and one document.

    Args:
        texts: documents of the corpus in a fixed order; read until `SCAN_FACTOR` times `sample_bytes` have been seen.
        sample_bytes: UTF-8 bytes of text to train on, at most.
        seed: of the draw.
        should_stop: looked at before every document.
        progress: told the bytes read; how many there will be is not known.

    Raises:
        StopRequested: `should_stop` became true.
    """
    # Negative keys make the heap's top the document that leaves first. Keys are distinct, so texts are never compared.
    chosen: list[tuple[int, int, bytes]] = []
    held = seen = seen_bytes = 0
    exhausted = True
    for index, text in enumerate(texts):
        if should_stop():
            raise StopRequested
        content = text.encode("utf-8", errors="replace")
        seen, seen_bytes = seen + 1, seen_bytes + len(content)
        progress(seen_bytes, None)
        key = int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest())
        heapq.heappush(chosen, (-key, index, content))
        held += len(content)
        while held - len(chosen[0][2]) >= sample_bytes:
            held -= len(heapq.heappop(chosen)[2])
        if seen_bytes >= SCAN_FACTOR * sample_bytes:
            exhausted = False
            break
    documents_cut = 0
    if held > sample_bytes:
        key, index, content = chosen[0]
        chosen[0] = (key, index, content[: len(content) - (held - sample_bytes)])
        documents_cut = 1
    used = [content.decode("utf-8", errors="ignore") for _, _, content in sorted(chosen, key=lambda item: item[1])]
    counts = {
        "seed": seed,
        "sample_bytes": sample_bytes,
        "documents_seen": seen,
        "bytes_seen": seen_bytes,
        "corpus_exhausted": exhausted,
        "documents_used": len(used),
        "documents_cut": documents_cut,
        "bytes_used": min(held, sample_bytes),
    }
    return Sample(used, counts)


def lines_of(text: str) -> Iterator[list[str]]:
    """The lines of `text`, each as the pieces of at most LINE_CHARACTERS it is cut to, none of which is skipped.

    A line is cut at a space where it has one, else anywhere.
    """
    for line in _LINE_END.split(text):
        pieces = []
        while len(line) > LINE_CHARACTERS:
            space = line.rfind(" ", 1, LINE_CHARACTERS + 1)
            end = space if space > 0 else LINE_CHARACTERS
            pieces.append(line[:end])
            line = line[end + 1 :] if space > 0 else line[end:]
        if line:
            pieces.append(line)
        if pieces:
            yield pieces


def train_tokenizer(sample: Sample, *, vocab_size: int, kind: Kind, should_stop: StopCheck = never) -> TrainedTokenizer:
    """Train a sentencepiece model with byte fallback.

    Args:
        sample: what `draw_sample` gave.
        vocab_size: pieces wanted, unk, bos, eos (ids 0, 1, 2) and 256 bytes among them.
        kind: the model's family.
        should_stop: looked at 20 times a second.

    Raises:
        InputError: there is no text, or it does not give `vocab_size` pieces, or the training process was killed.
        StopRequested: `should_stop` became true; the training process is gone.
        StorageError: the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="blockllm-tokenizer-") as name:
        folder = Path(name)
        lines = lines_cut = 0
        with (
            storage_errors(folder, "write the tokenizer's sample to"),
            (folder / "sample.txt").open("w", encoding="utf-8", newline="\n") as file,
        ):
            for text in sample.texts:
                for pieces in lines_of(text):
                    file.writelines(f"{piece}\n" for piece in pieces)
                    lines, lines_cut = lines + len(pieces), lines_cut + (len(pieces) > 1)
        if not lines:
            raise InputError(
                f"no text to train a tokenizer on: {sample.counts['documents_seen']} documents were read and the "
                'sample is empty; check data.train, or set tokenizer.source = "file"'
            )
        report = {"kind": kind, "vocab_size": vocab_size} | sample.counts | {"lines_cut": lines_cut}
        _run_child(folder, report, should_stop)
        return TrainedTokenizer((folder / "tokenizer.model").read_bytes(), report)


def _run_child(folder: Path, report: dict[str, Any], should_stop: StopCheck) -> None:
    """Train on `folder`/sample.txt in another process; it leaves tokenizer.model there, or problem.json.

    Raises:
        InputError: see `train_tokenizer`.
        StopRequested: `should_stop` became true.
        RuntimeError: the child failed in a way that is our bug.
    """
    # The child works in `folder`, since the model records the name of the sample as it is given, and a path would make
    # every model file another. It finds modules where this process finds them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}
    command = [sys.executable, "-m", __name__, report["kind"], str(report["vocab_size"])]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            if should_stop():
                raise StopRequested
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.communicate()
    if process.returncode == 0:
        return
    if (problem := folder / "problem.json").exists():
        raise InputError(_problem_message(report, json.loads(problem.read_text(encoding="utf-8"))))
    if process.returncode < 0:
        raise InputError(
            f"the process that trains the tokenizer was ended by {signal.Signals(-process.returncode).name}, most "
            f"likely for lack of memory; lower tokenizer.sample_bytes (now {report['sample_bytes']}, "
            f"{format_bytes(report['sample_bytes'])})"
        )
    raise RuntimeError(
        "tokenizer training failed:\n" + (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    )


def _problem_message(report: dict[str, Any], problem: dict[str, Any]) -> str:
    asked = f"tokenizer.vocab_size = {report['vocab_size']}"
    if smallest := problem.get("smallest"):
        return f"{asked}: at least {smallest} are needed: unk, bos, eos, 256 bytes, the space and one character"
    text = f"the text sampled ({report['documents_used']} documents, {format_bytes(report['bytes_used'])})"
    if reachable := problem.get("reachable"):
        return (
            f"{asked}: {text} gives at most {reachable} pieces of kind {report['kind']}; set tokenizer.vocab_size = "
            f"{reachable} or less, or give it more text (data.train, tokenizer.sample_bytes = {report['sample_bytes']})"
        )
    return f"{asked}: no tokenizer can be trained on {text}: {problem['reason']}"


def _train(kind: str, vocab_size: int) -> None:
    """The child's work: from sample.txt in the current folder make tokenizer.model, or problem.json and exit 3."""
    import sentencepiece

    sample = Path("sample.txt")
    if vocab_size < SMALLEST_VOCABULARY:
        _give_up(smallest=SMALLEST_VOCABULARY)
    _limit_alphabet(sample, max(2, (vocab_size - RESERVED_PIECES) // 2))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=str(sample),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=TRAINER_THREADS,
            minloglevel=1,
        )
    except RuntimeError as error:
        # The library has one exception for everything; the number is in "... set it to a value <= 1234".
        reachable = re.search(r"Vocabulary size too high.*<= (\d+)", str(error))
        _give_up(**({"reachable": int(reachable[1])} if reachable else {"reason": str(error)}))
    Path("tokenizer.model").write_bytes(model.getvalue())


def _give_up(**problem: int | str) -> NoReturn:
    Path("problem.json").write_text(json.dumps(problem), encoding="utf-8")
    sys.exit(3)


def _limit_alphabet(sample: Path, most: int) -> None:
    """End a line at every character that is not among the `most` frequent, if coverage would ask for more than those.

    Sentencepiece refuses a vocabulary with no room for the characters it must cover, and covers at least 98 % of the
    text. With byte fallback none is needed, so a small vocabulary spends at most half of its free pieces on characters.
    """
    text = sample.read_bytes().decode("utf-8")
    counts = Counter(text)
    del counts["\n"]
    needed, covered, total = 0, 0, counts.total()
    for _, count in counts.most_common():
        if covered >= CHARACTER_COVERAGE * total:
            break
        needed, covered = needed + 1, covered + count
    if needed > most:
        # The space is never rare: every line is given one at its start.
        del counts[" "]
        rare = {ord(character): "\n" for character, _ in counts.most_common()[most - 1 :]}
        sample.write_bytes(text.translate(rare).encode("utf-8"))


def _die_with_parent() -> None:
    """End this process when its parent, which holds the other end of stdin, is gone, however that came about."""

    def watch() -> None:
        # Nothing is ever written to it, so this returns at its end; sys.stdin's own lock would trouble a normal exit.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group; when to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    kind, vocab_size = sys.argv[1:]
    _train(kind, int(vocab_size))


if __name__ == "__main__":
    _main()
