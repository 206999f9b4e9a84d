"""The weights of a checkpoint of Hugging Face's form: one .safetensors file, or several with an index.

Only safetensors are read: other files of weights are pickles, which can run code. Everything is checked before the
first tensor is read, and tensors are read one at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from blockllm_cli.durable import file_sha256, read_json
from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.hf_config import CONFIG_FILE
from blockllm_cli.model.initial import InitialFiles
from blockllm_cli.model.weights import StoredTensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tables that old versions of transformers stored beside the weights; they follow from the architecture.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")

_DTYPES = ("F32", "BF16", "F16")  # safetensors' words


class InitialWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint under the names of our parameters, all there and of the right shape.

    Each is read when it is asked for, with its stored dtype, and not kept.

    Args:
        files: the checkpoint.
        config: the architecture that it has to have.

    Raises:
        InputError: weights are missing, of another form, or not those of `config`; the message names the tensor.
        StopRequested: a stop was asked for while files were fetched.
    """

    def __init__(self, files: InitialFiles, config: LlamaConfig) -> None:
        self._where = files.name
        self.paths = _weight_files(files)
        opened = [StoredTensors(path) for path in self.paths]
        self._stored = {name: tensors for tensors in opened for name in tensors if not _DERIVED.fullmatch(name)}
        self._shapes = config.parameter_shapes()
        self._check(config)

    def _check(self, config: LlamaConfig) -> None:
        for name, shape in self._shapes.items():
            if name not in self._stored:
                raise InputError(f"model.init: the weights in {self._where} lack {name!r}, which a Llama needs")
            stored, dtype = self._stored[name].form(name)
            if stored != shape:
                raise InputError(
                    f"model.init: {name!r} in {self._where} has shape {stored}, by its {CONFIG_FILE} it has {shape}"
                )
            if dtype not in _DTYPES:
                raise InputError(
                    f"model.init: {name!r} in {self._where} is stored as {dtype}; only {', '.join(_DTYPES)} can be "
                    "trained on"
                )
        for name in self._stored.keys() - self._shapes.keys():
            is_tied_head = config.tie_word_embeddings and name == _HEAD
            if not is_tied_head:
                raise InputError(
                    f"model.init: the weights in {self._where} hold {name!r}, which this architecture does not have"
                )
            if not torch.equal(self._stored[_HEAD][_HEAD], self._stored[_EMBEDDING][_EMBEDDING]):
                raise InputError(
                    f"model.init: {self._where} says tie_word_embeddings = true, but its {_HEAD!r} is not its embedding"
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._stored[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def file_hashes(self, should_stop: Callable[[], bool]) -> dict[str, str]:
        """File name -> SHA-256 of every file of weights.

        Raises:
            StopRequested: `should_stop` became true between two files.
        """
        hashes = {}
        for path in self.paths:
            if should_stop():
                raise StopRequested
            hashes[path.name] = file_sha256(path)
        return hashes


def _weight_files(files: InitialFiles) -> list[Path]:
    single = files.find(WEIGHTS_FILE)
    if single is not None:
        return [single]
    index = files.find(INDEX_FILE)
    if index is None:
        raise InputError(
            f"model.init: {files.name} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; files of other forms (.bin, "
            ".pt) can run code when they are read: transformers' save_pretrained writes such a model as safetensors"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no weight_map of file names")
    found = []
    for name in sorted(set(names.values())):
        path = files.find(name) if Path(name).name == name else None
        if path is None:
            raise InputError(f"model.init: {files.name} lacks {name}, which its {INDEX_FILE} names")
        found.append(path)
    return found


def tensor_sha256(tensor: Tensor) -> str:
    """Hex SHA-256 of the bytes of `tensor` (any dtype, any device)."""
    flat = tensor.detach().contiguous().cpu().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def equal_to_hashes(model: nn.Module, names: Iterable[str], hashes: Mapping[str, str]) -> list[str]:
    """Those of the parameters `names` whose bytes have the hash that `hashes` gives for them."""
    return [name for name in names if tensor_sha256(model.get_parameter(name)) == hashes.get(name)]
