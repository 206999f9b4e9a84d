"""Decoder layers as one compiled function.

All layers of a model are calls of one function whose weights are arguments, so one compilation serves them all. What
differs between layers, updates and methods is not in the compiled code: the weights come without `requires_grad`, the
matrices' gradients go where the operators' orders say (`operators.py`), and those of the norms, which cost next to
nothing, are always made and handed on or dropped outside. Three kinds of graph are left: for layers with a trained
matrix, for layers without one that a gradient passes through, which keep no inputs of matrices, and without a backward
pass for layers below the lowest trained weight.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockllm_cli.errors import RecipeError
from blockllm_cli.model.attention import is_blocked
from blockllm_cli.model.autograd import applied
from blockllm_cli.model.elementwise import gated_silu, rms_norm
from blockllm_cli.model.linears import Feed, Linear, SelfFeeding, hand_over
from blockllm_cli.model.operators import Part, attend_blocked, project, register_taker
from blockllm_cli.model.rotary import Turn


@dataclass(frozen=True)
class Compilation:
    """One graph that was compiled.

    Attributes:
        rows: B of the batch that asked for it.
        positions: L of that batch.
        masked: whether its rows hold several documents.
        differentiated: whether the graph has a backward pass.
        feeds: whether matrices are trained in it.
        seconds: how long it took.
    """

    rows: int
    positions: int
    masked: bool
    differentiated: bool
    feeds: bool
    seconds: float


class LayerCompiler:
    """Compiles the layer function of one model and counts how often.

    Args:
        backend: of `torch.compile`.

    Attributes:
        compilations: what was compiled so far, in order.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.compilations: list[Compilation] = []
        self._backend = backend
        self._seconds = 0.0
        self._count = 0
        self._seen: set[tuple[torch.Size, bool, bool, bool]] = set()
        self._refused: set[tuple[torch.Size, bool, bool, bool]] = set()
        # The compiler keeps its results by code object, and by its name which sizes have varied. With one of its own a
        # model does not use up the limit of another one in this process, and their widths stay constants.
        name = f"{_layer.__name__}_{uuid.uuid4().hex}"
        function = FunctionType(_layer.__code__.replace(co_name=name), _layer.__globals__, name)
        self._function = torch.compile(function, fullgraph=True, backend=self._compile)
        # Said again since this way of saying it tells the compiler too, which `on_machine` has no reason to load.
        torch.use_deterministic_algorithms(
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    @property
    def refused(self) -> int:
        """Kinds of batches that run without compilation because the limit was reached."""
        return len(self._refused)

    @property
    def limit(self) -> int:
        """Compilations at most, torch's own setting; what would need one more runs as if nothing were compiled."""
        import torch._dynamo.config as settings  # heavy

        return int(settings.recompile_limit)

    def call(self, x: Tensor, *arguments: Any) -> Tensor | None:
        """`_layer`, compiled; None if that would need one compilation more than `limit`.

        Raises:
            RecipeError: the compiler fails.
        """
        import torch._dynamo.exc as dynamo  # heavy

        mask, feeds, count = arguments[3], arguments[5], self._count  # of `_layer` without x
        kind = (x.shape, mask is not None, x.requires_grad, feeds)
        if kind in self._refused:
            return None
        tracing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if kind not in self._seen:
            tracing = _while_tracing()
            _mark_sizes(x, arguments[2], mask)
        try:
            with tracing:
                result: Tensor = self._function(x, *arguments)
        except dynamo.FailOnRecompileLimitHit:
            self._refused.add(kind)
            return None
        except dynamo.TorchDynamoException as error:
            raise _compile_error(error) from error
        self._seen.add(kind)
        if self._count > count:
            self.compilations.append(
                Compilation(x.shape[0], x.shape[1], mask is not None, x.requires_grad, feeds, self._seconds)
            )
        return result

    def _compile(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        started = time.perf_counter()
        compiled: Callable[..., Any] = lookup_backend(self._backend)(graph, list(inputs))
        self._seconds = time.perf_counter() - started
        self._count += 1
        return compiled


class CompiledLayer:
    """One decoder layer's call of the compiled function.

    Args:
        norms: before attention, before the MLP.
        matrices: q, k, v, o, gate, up, down.
        head_dim: channels of a head.
        eps: of the norms.
        compiler: shared by the layers of a model.
    """

    def __init__(
        self,
        norms: tuple[SelfFeeding, SelfFeeding],
        matrices: Sequence[Linear],
        *,
        head_dim: int,
        eps: float,
        compiler: LayerCompiler,
    ) -> None:
        self._norms = norms
        self._matrices = tuple(matrices)
        query, key, value, output, gate, up, down = self._matrices
        self._by_part = {
            Part.QUERY_KEY_VALUE: (query, key, value),
            Part.OUTPUT: (output,),
            Part.GATE_UP: (gate, up),
            Part.DOWN: (down,),
        }
        self._head_dim = head_dim
        self._eps = eps
        self._compiler = compiler
        self._number = register_taker(self)
        self._orders: dict[int, Tensor] = {}
        self._anchor = torch.empty(0, requires_grad=True)
        for module in (*norms, *matrices):
            module.feeds_all = True

    def call(self, x: Tensor, turn: Turn, mask: Tensor | None) -> Tensor | None:
        """The layer's output for the residual stream `x` (B, L, D); None if the layer has to run as it is.

        It has to if a weight wants its gradient by other ways than feeds, or if the compiler's limit is reached.
        """
        modules = (*self._norms, *self._matrices)
        if not torch.is_grad_enabled() or any(m.weight.requires_grad and not m.feeds for m in modules):
            return None
        wanted, is_trained = self._wanted(x.requires_grad)
        orders = self._orders.get(wanted)
        if orders is None:
            orders = self._orders[wanted] = torch.tensor([self._number, wanted])
        norms: tuple[Tensor, ...] = tuple(norm.weight.detach() for norm in self._norms)
        if is_trained:
            x, *norms = applied(_Entry, self._anchor, x, *norms, [norm.feeds for norm in self._norms])
        matrices = tuple(matrix.weight.detach() for matrix in self._matrices)
        feeds = any(matrix.feeds for matrix in self._matrices)
        return self._compiler.call(x, tuple(norms), matrices, turn, mask, orders, feeds, self._head_dim, self._eps)

    def take(self, part: int, gradients: Sequence[Tensor], x: Tensor) -> None:
        """See `Taker`."""
        for matrix, gradient in zip(self._by_part[Part(part)], gradients, strict=True):
            hand_over(gradient, x, matrix.feeds)

    def _wanted(self, below: bool) -> tuple[int, bool]:
        """Which parts need the gradient of their input, as bits; whether anything here or below is trained.

        What autograd finds out by itself where it can look inside.

        Args:
            below: whether the residual stream needs a gradient.
        """
        fed = {part: any(matrix.feeds for matrix in matrices) for part, matrices in self._by_part.items()}
        first, second = (bool(norm.feeds) for norm in self._norms)
        into_query = below or first
        into_output = into_query or fed[Part.QUERY_KEY_VALUE]
        into_gate = into_output or fed[Part.OUTPUT] or second
        into_down = into_gate or fed[Part.GATE_UP]
        wanted = (
            into_query << Part.QUERY_KEY_VALUE
            | into_output << Part.ATTENTION
            | into_output << Part.OUTPUT
            | into_gate << Part.GATE_UP
            | into_down << Part.DOWN
        )
        return wanted, into_down or fed[Part.DOWN]


class _Entry(torch.autograd.Function):
    """Before a compiled layer: everything requires a gradient from here on; what nobody wants ends here."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, first: Tensor, second: Tensor, feeds: Sequence[tuple[Feed, ...]]
    ) -> tuple[Tensor, ...]:
        ctx.feeds = feeds
        return x.detach(), first.detach(), second.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_gradient: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The layer is through with its norms: their feeds may write them.
        for gradient, feeds in zip(gradients, ctx.feeds, strict=True):
            for feed in feeds:
                feed.accept_rows(gradient)
        return None, x_gradient if ctx.needs_input_grad[1] else None, None, None, None


@contextlib.contextmanager
def _while_tracing() -> Iterator[None]:
    """Let torch tell when its limit is reached, and not warn of what it does itself.

    That is to read `.grad` of any tensor and to call what it has deprecated.
    """
    import torch._dynamo.config as settings  # heavy

    with warnings.catch_warnings(), settings.patch(fail_on_recompile_limit_hit=True):
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _mark_sizes(x: Tensor, turn: Turn, mask: Tensor | None) -> None:
    """Rows and positions are to be variables from the first compilation on: one graph serves all batches.

    Without this a batch of another size would need a second one, and which graph serves a batch, on which its last bits
    depend, would follow from the batches before it.
    """
    from torch._dynamo import maybe_mark_dynamic  # heavy

    maybe_mark_dynamic(x, (0, 1))
    for tensor in turn:
        maybe_mark_dynamic(tensor, 0)
    if mask is not None:
        maybe_mark_dynamic(mask, (0, 2, 3))


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing for `device`, so that a machine without a compiler is known before anything is written.

    Raises:
        RecipeError: it cannot be done.
    """
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        # Of any kind: a folder for the generated code that cannot be written, a compiler that is switched off.
        raise _compile_error(error) from error


def _compile_error(error: Exception) -> RecipeError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    words = lines[0].rstrip(".:") if lines else repr(error)
    return RecipeError(
        f'run.compile = "layer": torch.compile fails on this machine: {words}. Set '
        'run.compile = "off"; or give it what it needs: a C++ compiler for the CPU (g++ or clang++ on PATH, or the one '
        "that CXX names) and a folder that can be written (TORCHINDUCTOR_CACHE_DIR), Triton for a GPU"
    )


def _layer(
    x: Tensor,
    norms: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, ...],
    turn: Turn,
    mask: Tensor | None,
    orders: Tensor,
    feeds: bool,
    head_dim: int,
    eps: float,
) -> Tensor:
    """`DecoderLayer.forward` with everything as an argument, for the compiler.

    Args:
        x: residual stream (B, L, D).
        norms: weights of the two norms.
        matrices: weights of q, k, v, o, gate, up, down.
        turn: of the positions.
        mask: as in `attend`.
        orders: as in `operators`.
        feeds: whether the gradient of any matrix is wanted.
        head_dim: channels of a head.
        eps: of the norms.
    """
    query_weight, key_weight, value_weight, output_weight, gate_weight, up_weight, down_weight = matrices
    heads = (*x.shape[:-1], -1, head_dim)
    weights = [query_weight, key_weight, value_weight]
    query, key, value = project(rms_norm(x, norms[0], eps), weights, orders, Part.QUERY_KEY_VALUE.value, feeds)
    query, key, value = _turned(query.view(heads), turn), _turned(key.view(heads), turn), value.view(heads)
    value = value.transpose(1, 2)
    if is_blocked(query):
        mixed = attend_blocked(query, key, value, mask, orders)
    else:
        is_grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
        )
    (output,) = project(mixed.transpose(1, 2).flatten(2), [output_weight], orders, Part.OUTPUT.value, feeds)
    x = x + output
    gate, up = project(rms_norm(x, norms[1], eps), [gate_weight, up_weight], orders, Part.GATE_UP.value, feeds)
    (down,) = project(gated_silu(gate, up), [down_weight], orders, Part.DOWN.value, feeds)
    total: Tensor = x + down
    return total


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """`rotary.turned` in operators that the compiler can join."""
    x = x.transpose(1, 2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * turn.cosine - second * turn.sine, second * turn.cosine + first * turn.sine), -1)
