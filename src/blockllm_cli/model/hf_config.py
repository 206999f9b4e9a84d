"""A Llama's architecture as the `config.json` of Hugging Face transformers, read and written. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from blockllm_cli.errors import InputError
from blockllm_cli.model.config import LlamaConfig

CONFIG_FILE = "config.json"

# What transformers takes where a config.json says nothing; what is not here has to be said.
_DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_FLOATS = ("rope_theta", "rms_norm_eps", "initializer_range")
_MODEL_TYPES = ("llama", "mistral")
_MOST_LAYERS = 10_000  # a damaged file must not fill the memory with the names of its tensors


class _Refused(NamedTuple):
    key: str
    value: Any
    reason: str


def architecture(config: Mapping[str, Any], place: str) -> LlamaConfig:
    """The architecture that `config`, the content of a config.json, describes.

    `mistral` is the same architecture where it has no sliding window, and is read too.

    Args:
        config: the parsed file.
        place: names the file in messages.

    Raises:
        InputError: something is missing, or the model computes what this Llama does not.
    """
    for refused in _refused(config):
        raise InputError(f"{place}: {refused.key} is {refused.value!r}; {refused.reason}")
    values: dict[str, Any] = {}
    for name in LlamaConfig.__dataclass_fields__:
        value = _rope(config).get(name, config.get(name)) if name == "rope_theta" else config.get(name)
        if value is None:
            value = config.get("num_attention_heads") if name == "num_key_value_heads" else _DEFAULTS.get(name)
        if value is None:
            raise InputError(f"{place} lacks {name}, which the architecture of a Llama needs")
        values[name] = _typed(name, value, place)
        _check_range(name, values[name], place)
    try:
        found = LlamaConfig(**values)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    if config.get("head_dim") not in (None, found.head_dim):
        wanted = f"it must be hidden_size / num_attention_heads, {found.head_dim}"
        raise InputError(f"{place}: head_dim is {config['head_dim']!r}; {wanted}")
    return found


def _typed(name: str, value: Any, place: str) -> Any:
    """`value` as the type of the field: JSON has one kind of number, and `true` is none."""
    wanted = bool if name == "tie_word_embeddings" else float if name in _FLOATS else int
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise InputError(f"{place}: {name} is {value!r}, which is no {wanted.__name__}")
    return value


def _check_range(name: str, value: Any, place: str) -> None:
    """Refuse what a recipe could not say either, since a run keeps these values in its recipe."""
    if name in _FLOATS and not 0 < value < math.inf:
        raise InputError(f"{place}: {name} is {value!r}; it must be a number above 0")
    if name == "num_hidden_layers" and value > _MOST_LAYERS:
        raise InputError(f"{place}: {name} is {value}; more than {_MOST_LAYERS:,} are not believed")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of the rotary positions, which transformers 5 keeps in a table of their own."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return table if isinstance(table, Mapping) else {}


def _refused(config: Mapping[str, Any]) -> Iterator[_Refused]:
    """What `config` asks for that this Llama does not compute."""
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        yield _Refused("model_type", kind, f"only {' and '.join(_MODEL_TYPES)} can be read")
    # A Mistral whose file does not say has a window of 4,096.
    if kind == "mistral" and config.get("sliding_window", 4096) is not None:
        window = config.get("sliding_window", 4096)
        yield _Refused("sliding_window", window, "attention here sees everything before: only null works")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield _Refused(key, config[key], "linear layers here have no bias: only false works")
    if config.get("hidden_act", "silu") != "silu":
        yield _Refused("hidden_act", config["hidden_act"], "the MLP here is gated by silu: only silu works")
    # Either table may be there, and transformers takes both.
    tables = [(key, config[key]) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    for key, table in tables:
        if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
            yield _Refused(key, table, "it must be one table for all layers")
            return
        form = table.get("rope_type", table.get("type", "default"))
        if form != "default":
            yield _Refused("rope_scaling", form, "rotary positions here are not scaled: only the type default works")
    for table in (config, *(table for _, table in tables)):
        if table.get("partial_rotary_factor", 1.0) != 1.0:
            yield _Refused(
                "partial_rotary_factor", table["partial_rotary_factor"], "all channels of a head turn here: only 1"
            )
    if config.get("quantization_config") is not None:
        yield _Refused("quantization_config", config["quantization_config"], "give the weights before quantisation")


def config_json(config: LlamaConfig, *, dtype: str, positions: int, bos_id: int | None, eos_id: int) -> dict[str, Any]:
    """The content of config.json for a model of this architecture, for transformers 4 and 5 alike.

    Args:
        config: the architecture.
        dtype: of the stored weights, such as "bfloat16".
        positions: longest text that the model has seen; other tools cut or warn there.
        bos_id: id that opens a text; None: none does.
        eos_id: id that ends a text.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": positions,
        # transformers 4 knows rope_theta alone; 5 has this table, and takes rope_theta where it is missing.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }
