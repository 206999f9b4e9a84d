"""The data pipeline: tokens a core makes from text and from the tokenised cache, beside what training takes of them.

    python bench/data.py --data FOLDER        # *train*.json.gz, shaped as C4's shards
    python bench/data.py --data FOLDER --documents 4000 --updates 40

Rates are of one process and its processor time, which other programs on the machine disturb little: reading,
decompressing and parsing, tokenising, and laying out rows. The demand is what the 9m model trains on this machine, with
all its cores, measured in the same call by the command's own runs, the fastest update counted; the target is 5 times
that. The last line is the share of its time that a 60m run from files waits for data, blocks being small so that it
crosses several; the wait for the first block, which every run has once, stands beside it. The target is 1 %.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from blockllm_cli import metrics
from blockllm_cli.data.blocks import StreamSettings, TextBlock, build_block, read_blocks
from blockllm_cli.data.corpus import Corpus, found_files
from blockllm_cli.data.prepared import NOTHING_PREPARED, PreparedShards, find_prepared
from blockllm_cli.data.prepared_writing import Preparation
from blockllm_cli.data.stopping import never
from blockllm_cli.data.tokenizer import Tokenizer
from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer
from blockllm_cli.runner.pretrain import PretrainRequest, pretrain
from blockllm_cli.tracking.terminal import Terminal

TIMES_THE_DEMAND, WAITING_SHARE = 5.0, 0.01
LENGTH = 256
SHARDS = 3
"""Of the folder, that rates are measured on; the runs read all."""

RECIPE = """
[run]
name = "bench-data"
output = {output}
device = "cpu"
[model]
size = {size}
[tokenizer]
source = "file"
path = {tokenizer}
[data]
corpus = "files"
train = {train}
sequence_length = 256
block_documents = {block_documents}
cache = {cache}
[batch]
rows = {rows}
[schedule]
steps = {steps}
learning_rate = 1e-4
[method]
name = "adamw"
[evaluate]
at_start = false
tokens = 256
[tracking]
log_every = 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with *train*.json.gz")
    parser.add_argument("--documents", type=int, default=2000, help="that are read and tokenised for a rate")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--sample-bytes", type=int, default=6_000_000, help="that tokenizers are trained on")
    parser.add_argument("--updates", type=int, default=16, help="of the 60m run; the 9m run has as many")
    options = parser.parse_args()
    corpus = Corpus(found_files("--data", str(options.data / "*train*.json.gz"))[:SHARDS])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, vocabulary {options.vocab_size}")
    with tempfile.TemporaryDirectory(prefix="blockllm-bench-") as name:
        folder = Path(name)
        models = {kind: trained(corpus, kind, options, folder) for kind in ("bpe", "unigram")}
        rates = [rate for kind, model in models.items() for rate in measured(corpus, kind, model, options, folder)]
        run = Run(folder, options.data, models["unigram"])
        demand = max(row[metrics.TOKENS_PER_SECOND] for row in run.rows("9m", 16, options.updates, 4096)[1:])
        print(f"the 9m model trains {demand:,.0f} tokens/s here")
        for label, rate in rates:
            ratio = rate / demand
            met = verdict(ratio >= TIMES_THE_DEMAND)
            print(f"{label}: {ratio:,.0f} times that (at least {TIMES_THE_DEMAND:.0f}: {met})")
        print_waiting(run.rows("60m", 4, options.updates, 32))


def trained(corpus: Corpus, kind: Any, options: argparse.Namespace, folder: Path) -> Path:
    """A tokenizer of the corpus in a file."""
    path = folder / f"{kind}.model"
    sample = draw_sample(corpus.texts(), sample_bytes=options.sample_bytes, seed=0, should_stop=never)
    made = train_tokenizer(sample, vocab_size=options.vocab_size, kind=kind, should_stop=never)
    path.write_bytes(made.model_bytes)
    return path


def measured(
    corpus: Corpus, kind: str, model: Path, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, float]]:
    """Tokens per second of a core, from text and from the cache, each said where it goes."""
    tokenizer = Tokenizer(model.read_bytes())
    settings = StreamSettings(seed=0, sequence_length=LENGTH, layout="pack", block_documents=500, workers=0)
    cache = folder / "cache"
    with Preparation(tokenizer, cache, workers=0) as preparation:
        for shard in corpus.shards:
            preparation.prepare(shard)
    for source, prepared in (
        ("text", NOTHING_PREPARED),
        ("the cache", find_prepared(corpus.shards, tokenizer, cache)),
    ):
        reading, blocks = seconds(lambda prepared=prepared: first(corpus, settings, prepared, options.documents))
        making, built = seconds(lambda blocks=blocks: [build_block(each, tokenizer, settings).rows for each in blocks])
        tokens = sum(int(rows.targets_per_row().sum()) for rows in built)
        print(
            f"{kind} from {source}: {tokens / (reading + making):,.0f} tokens/s of a core "
            f"({tokens:,} tokens: reading {reading:.2f} s, rows {making:.2f} s)"
        )
        yield f"{kind} from {source}", tokens / (reading + making)


def first(corpus: Corpus, settings: StreamSettings, prepared: PreparedShards, documents: int) -> list[TextBlock]:
    """The first blocks of the corpus, of as many documents together."""
    count = max(1, documents // settings.block_documents)
    return list(islice(read_blocks(corpus, settings=settings, prepared=prepared), count))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a call, and what it gave."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


class Run:
    """Runs of the command on the same data."""

    def __init__(self, folder: Path, data: Path, tokenizer: Path) -> None:
        self._folder = folder
        self._data = data
        self._tokenizer = tokenizer

    def rows(self, size: str, rows: int, steps: int, block_documents: int) -> list[metrics.Row]:
        """Rows of metrics of a run from files, one an update."""
        recipe = self._folder / f"{size}.toml"
        values = {
            "output": str(self._folder / "runs"),
            "size": size,
            "tokenizer": str(self._tokenizer),
            "train": str(self._data / "*train*.json.gz"),
            "cache": str(self._folder / "unprepared"),
        }
        texts = {name: json.dumps(value) for name, value in values.items()}
        recipe.write_text(RECIPE.format(**texts, rows=rows, steps=steps, block_documents=block_documents))
        with Terminal(Console(file=io.StringIO())) as terminal:
            folder = pretrain(PretrainRequest(str(recipe)), terminal)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def print_waiting(rows: list[metrics.Row]) -> None:
    """Share of the time between the first update and the last but one; the last row has the evaluation in it."""
    begin, end = rows[0], rows[-2]
    waited = end[metrics.DATA_WAIT_SECONDS] - begin[metrics.DATA_WAIT_SECONDS]
    took = end[metrics.ELAPSED_SECONDS] - begin[metrics.ELAPSED_SECONDS]
    share = waited / took
    print(
        f"a 60m run from files waits {share:.2%} of its time for data (at most {WAITING_SHARE:.0%}: "
        f"{verdict(share <= WAITING_SHARE)}; {waited:.2f} of {took:.1f} s in {len(rows) - 2} updates), and "
        f"{begin[metrics.DATA_WAIT_SECONDS]:.1f} s for its first block and what follows it"
    )


def verdict(is_met: bool) -> str:
    """One word."""
    return "yes" if is_met else "NO"


if __name__ == "__main__":
    main()
