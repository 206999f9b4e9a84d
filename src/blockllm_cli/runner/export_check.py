"""Whether an exported model is the run's: what was written is read back, computed with, and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.data.fast_tokenizer import TOKENIZER_JSON
from blockllm_cli.data.tokenizer import AnyTokenizer
from blockllm_cli.errors import GuardError
from blockllm_cli.hub.link import PROBE_SECONDS, Link
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.initial import initial_files
from blockllm_cli.model.initial_weights import InitialWeights
from blockllm_cli.model.llama import model_of

TOLERANCE = 1e-4
"""Largest difference of a logit between transformers and us, in fp32, as a share of the largest logit (or of 1)."""

_PROBE_ROWS, _PROBE_LENGTH = 2, 64

# What tokenizers are known to disagree on: spaces in runs and at the ends, other blanks, the sign that stands for a
# space, characters spelled in bytes, names of special pieces, repetition.
AWKWARD = (
    "",
    " ",
    " " * 37,
    "  two  spaces, at the ends too  ",
    "lines\n\n\r\n\tand tabs\x00null\x85\u2028\ufeff",
    "\u2581 and \u2581\u2581x",
    "\U0001f600 e\u0301 \u0639\u0631\u0628\u064a \u4f60\u597d\u3000\u00a0.",
    "</s><s><unk> <0x0A>",
    "aaaaaaaaaaaaa abababababa ==--==--== 1234567890",
)


@dataclass(frozen=True)
class Comparison:
    """What was compared and how it came out; differences of logits are the largest of any position and token.

    Attributes:
        probe_tokens: positions that were computed.
        largest_logit: of the run's model, in absolute value: the scale of the differences.
        stored_difference: the run's weights against the stored ones, both computed here in fp32; 0 unless the export
            stores another dtype.
        transformers: its version; None: not installed.
        transformers_difference: transformers against us on the stored weights, both in fp32.
        tokenizers: version of the package that read tokenizer.json; None: not installed, or there is no such file.
        texts: texts that both tokenizers encoded.
        texts_different: those with other ids or another text when decoded.
    """

    probe_tokens: int
    largest_logit: float
    stored_difference: float
    transformers: str | None
    transformers_difference: float | None
    tokenizers: str | None
    texts: int
    texts_different: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare(
    folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, tokenizer: AnyTokenizer, config: LlamaConfig
) -> Comparison:
    """Read the export in `folder` back and compare it with the run.

    Args:
        folder: the export.
        weights: plain weights of the run's model.
        dtype: that the export stores.
        tokenizer: of the run.
        config: architecture of the run's model.

    Raises:
        GuardError: it is not the same model: a weight, the architecture or what transformers computes differs.
    """
    files = initial_files(str(folder), Link(PROBE_SECONDS))
    if files.config() != config:
        raise GuardError(f"the exported configuration {files.config()} is not that of the run, {config}")
    stored = InitialWeights(files, config)
    for name, weight in weights.items():
        if not _equal_bits(stored[name], weight.to("cpu", dtype)):
            raise GuardError(f"the exported {name!r} is not what the run has: the disk did not keep what was written")
    ids = torch.randint(tokenizer.vocab_size, (_PROBE_ROWS, _PROBE_LENGTH), generator=torch.Generator().manual_seed(0))
    reference = _logits(config, weights, ids)
    ours = _logits(config, stored, ids)
    largest = float(reference.abs().max())
    version, theirs = _transformers_logits(folder, ids)
    difference = None if theirs is None else float((theirs - ours).abs().max())
    # A NaN is no agreement.
    if difference is not None and not difference <= TOLERANCE * max(1.0, largest):
        raise GuardError(
            f"transformers {version} computes other logits from the export than the run does: largest difference "
            f"{difference:.2e}, largest logit {largest:.2e}"
        )
    library, texts, different = _compare_tokenizers(folder, tokenizer)
    return Comparison(
        ids.numel(),
        largest,
        float((ours - reference).abs().max()),
        version,
        difference,
        library,
        texts,
        different,
    )


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@torch.inference_mode()
def _logits(config: LlamaConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of our model with these weights, in fp32 on the CPU; the copy of the weights is gone after."""
    model = model_of(config, lambda name, _: weights[name])
    logits: Tensor = model(ids)
    return logits


def _transformers_logits(folder: Path, ids: Tensor) -> tuple[str | None, Tensor | None]:
    """Version of transformers and the logits it computes in fp32, or nothing if it is not installed."""
    try:
        import transformers
    except ImportError:
        return None, None
    with _quiet(transformers), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        logits: Tensor = model(ids).logits
    return str(transformers.__version__), logits.float()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the progress bars of transformers off the terminal, and leave its setting as it was."""
    logging = transformers.utils.logging
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _compare_tokenizers(folder: Path, tokenizer: AnyTokenizer) -> tuple[str | None, int, int]:
    """Version of `tokenizers`, texts compared, texts that it treats otherwise; (None, 0, 0) where it cannot."""
    path = folder / TOKENIZER_JSON
    try:
        import tokenizers
    except ImportError:
        return None, 0, 0
    if not path.is_file():
        return None, 0, 0
    other = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    other.no_truncation()
    other.no_padding()
    other.encode_special_tokens = True
    texts = [*AWKWARD, *_invented_texts(tokenizer)]
    different = 0
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        there = other.encode(text, add_special_tokens=False).ids
        # What is unknown has no text: here it reads as a sign, there it is left out.
        same = there == ids.tolist() and (tokenizer.unk_id in there or other.decode(there) == tokenizer.decode(ids))
        different += not same
    return str(tokenizers.__version__), len(texts), different


def _invented_texts(tokenizer: AnyTokenizer) -> list[str]:
    """Texts of random pieces: every kind of piece beside every other, which no real text has."""
    draws = torch.randint(tokenizer.vocab_size, (64, 64), generator=torch.Generator().manual_seed(1))
    return [tokenizer.decode(row) for row in draws.tolist()]
