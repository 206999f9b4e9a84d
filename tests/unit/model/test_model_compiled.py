"""Compiled layers: the numbers of plain ones, few compilations, no product that nobody takes."""

import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from blockllm_cli.errors import RecipeError
from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense, Gather, Layerwise, Rows
from blockllm_cli.gradients.sketch import Sketch
from blockllm_cli.model.batch import batch_of
from blockllm_cli.model.compiled import LayerCompiler, check_compiler
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.optim.entries import Entries

LENGTH = 12
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYERS = [f"model.layers.{index}." for index in range(3)]
MATRICES = [f"self_attn.{one}_proj.weight" for one in "qkvo"] + [
    f"mlp.{one}_proj.weight" for one in ("gate", "up", "down")
]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]


def llama(*, compiled=None, dtype=torch.float32, checkpointed=False):
    """A model; with its compiler if `compiled` is the back end of one."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    model = build_model(config, seed=1, dtype=dtype, checkpoint_activations=checkpointed)
    return (model, model.compile_layers(compiled)) if compiled else model


@pytest.fixture(scope="module")
def shared():
    """A plain model, one with compiled layers, and its compiler."""
    return llama(), *llama(compiled="aot_eager")


def batch(rows=4, length=LENGTH, packed=False):
    generator = np.random.Generator(np.random.Philox(3))
    pieces = generator.integers(0, 40, (rows, length + 1), dtype=np.int32)
    documents = np.zeros_like(pieces)
    if packed:
        documents[:, length // 3 :] = 1
    return batch_of(pieces, documents, sequence_length=length)


def run(model, routes, given=None, feeding="auto"):
    given = batch() if given is None else given
    with routed(model, routes, feeding=feeding):
        loss = model.loss(given, scale=1 / given.num_targets)[0]
        loss.backward()
    return loss.detach()


def dense(model, names=None, **options):
    """Loss and gradients of `names`, all without."""
    routes = {name: Dense() for name in names or [name for name, _ in model.named_parameters()]}
    loss = run(model, routes, **options)
    return {"loss": loss} | {name: route.result() for name, route in routes.items()}


def assert_equal(made, wanted, tolerance=3e-6):
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value is not None, name
        assert (made[name].double() - value.double()).norm() <= tolerance * value.double().norm(), name


SELECTIONS = [
    None,
    [EMBEDDING],
    [HEAD, NORM],
    [LAYERS[2] + one for one in MATRICES + NORMS] + [HEAD],
    [LAYERS[1] + "mlp.down_proj.weight"],
    [LAYERS[1] + "self_attn.v_proj.weight", LAYERS[2] + NORMS[1]],
    [LAYERS[1] + NORMS[0]],
    [LAYERS[1] + NORMS[1], LAYERS[2] + "mlp.up_proj.weight"],
    [LAYERS[0] + "self_attn.o_proj.weight"],
    [LAYERS[1] + "mlp.gate_proj.weight"],
]


def test_every_selection_gives_the_gradients_of_plain_layers(shared):
    """R19: what is trained changes between updates, and the compiled code does not."""
    plain, model, compiler = shared
    for names in SELECTIONS + SELECTIONS[::-1]:
        made, wanted = dense(model, names), dense(plain, names)
        assert made["loss"] == wanted["loss"]
        assert_equal(made, wanted)
    kinds = [(compilation.differentiated, compilation.feeds) for compilation in compiler.compilations]
    assert sorted(kinds) == [(False, False), (True, False), (True, True)]
    assert compiler.refused == 0


def test_recomputed_activations_change_nothing(shared, monkeypatch):
    plain, model, compiler = shared
    count = max(3, len(compiler.compilations))
    monkeypatch.setattr(model.model, "checkpoint_activations", True)
    for names in SELECTIONS:
        assert_equal(dense(model, names), dense(plain, names))
    assert len(compiler.compilations) == count


def test_bf16_differs_by_rounding_alone():
    plain, (model, _) = llama(dtype=torch.bfloat16), llama(compiled="aot_eager", dtype=torch.bfloat16)
    exact = dense(llama())
    rounding = {name: (value.double() - exact[name].double()).norm() for name, value in dense(plain).items()}
    for name, value in dense(model).items():
        assert (value.double() - exact[name].double()).norm() <= 1.5 * rounding[name] + 1e-3, name


def test_one_graph_serves_batches_of_all_sizes():
    """The truncate layout gives every batch a width of its own; the widths before it do not choose its graph."""
    plain, (model, compiler) = llama(), llama(compiled="eager")
    for length, rows, packed in product((12, 9, 7), (4, 2), (False, True)):
        given = batch(rows, length, packed)
        assert (given.documents is not None) == packed
        assert_equal(dense(model, given=given), dense(plain, given=given))
    assert [compilation.masked for compilation in compiler.compilations] == [False, True]


def test_past_the_limit_layers_run_as_they_are():
    plain, (model, compiler) = llama(), llama(compiled="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        assert compiler.limit == 1
        for packed in (False, True, False):
            given = batch(packed=packed)
            assert_equal(dense(model, given=given), dense(plain, given=given))
    assert (len(compiler.compilations), compiler.refused) == (1, 1)


def test_two_models_do_not_share_a_limit():
    (one, first), (other, second) = llama(compiled="eager"), llama(compiled="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        dense(one)
        dense(other)
    assert (len(first.compilations), first.refused, len(second.compilations), second.refused) == (1, 0, 1, 0)


def products(model, names):
    dense(model, names)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        dense(model, names)
    return sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


@pytest.mark.parametrize("names", SELECTIONS)
def test_only_products_that_somebody_takes_are_made(shared, names):
    """None for frozen weights, and no input gradient below the lowest trained one."""
    plain, model, _ = shared
    assert products(model, names) <= products(plain, names)


def test_every_kind_of_route_is_served(shared):
    name, rows, width = LAYERS[1] + "mlp.up_proj.weight", 24, 16
    norm = LAYERS[1] + NORMS[1]

    def routes():
        return {
            f"{name}@part": Rows(2, 9, Dense()),
            f"{name}@numbers": Gather(Entries.of(torch.tensor([0, 5, 23]), (rows, width), "row")),
            f"{name}@sketch": Sketch(7, 0, name),
            f"{norm}@part": Rows(0, 8, Dense()),
            f"{norm}@entries": Gather(Entries.of(torch.tensor([1, 4]), (16,))),
            f"{LAYERS[0]}self_attn.q_proj.weight": Rows(1, 4, Dense()),
        }

    wanted, made = routes(), routes()
    run(shared[0], wanted)
    run(shared[1], made)
    assert_equal({key: route.result() for key, route in made.items()}, {k: r.result() for k, r in wanted.items()})


def test_writing_inside_the_backward_pass_is_writing_after_it():
    rate, (model, _), twin = 3.0, llama(compiled="aot_eager", checkpointed=True), llama()

    def writer(weight):
        return Layerwise(lambda gradient: weight.sub_(rate * gradient))

    routes = {name: writer(weight.detach()) for name, weight in model.named_parameters()}
    for _ in range(2):
        run(model, routes)
        gradients = dense(twin)
        for name, parameter in twin.named_parameters():
            parameter.detach().sub_(rate * gradients[name])
    for made, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_nobody_holds_is_freed():
    model, _ = llama(compiled="eager")
    gone = weakref.ref(model.model.layers[0].compiled)
    del model
    gc.collect()
    assert gone() is None


def test_gradients_that_do_not_go_by_feeds_are_not_lost():
    """Hooks, and autograd without routes: such a pass runs plain layers."""
    plain, (model, compiler) = llama(), llama(compiled="eager")
    wanted = dense(plain)
    assert_equal(dense(model, feeding="hook"), wanted)
    given = batch()
    model.loss(given, scale=1 / given.num_targets)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])
    assert compiler.compilations == []
    for name in (LAYERS[1] + NORMS[0], LAYERS[1] + MATRICES[0]):
        assert_equal(dense(model, [name], feeding="hook"), {key: wanted[key] for key in ("loss", name)})


def test_names_and_evaluation_are_those_of_plain_layers(shared):
    """R14."""
    plain, model, compiler = shared
    dense(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    count = len(compiler.compilations)
    assert torch.equal(model.row_nll(batch())[0], plain.row_nll(batch())[0])
    assert len(compiler.compilations) == count


def kept_bytes(model, names):
    """Bytes that the backward pass keeps, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        routed(model, {name: Dense() for name in names}),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.model(batch().input_ids)
        return sum(kept.values())


class Watching(Dense):
    """Remembers whether any gradient shown before is still alive when this one comes."""

    seen = None

    def accept(self, gradient):
        self.alive = sum(reference() is not None for reference in self.seen)
        self.seen.append(weakref.ref(gradient))


def test_one_gradient_of_a_matrix_is_in_flight_at_a_time(shared, monkeypatch):
    monkeypatch.setattr(Watching, "seen", [])
    routes = {layer + name: Watching() for layer in LAYERS for name in MATRICES}
    run(shared[1], routes)
    assert len(Watching.seen) == len(routes)
    assert {route.alive for route in routes.values()} == {0}


@pytest.mark.parametrize(("trained", "most"), [(LAYERS, 1.001), (LAYERS[:1], 1.001), (LAYERS[1:], 1.001), ([], 0.0)])
def test_no_more_is_kept_for_the_backward_pass_than_by_plain_layers(shared, trained, most):
    """No inputs of matrices, where layers are frozen above trained ones; the orders of each layer are 16 bytes."""
    names = [layer + one for layer in trained for one in MATRICES + NORMS]
    plain, model, _ = shared
    assert kept_bytes(model, names) <= most * kept_bytes(plain, names)


@pytest.mark.parametrize("kind", [torch._dynamo.exc.TorchDynamoException, OSError, RuntimeError])
def test_a_compiler_that_fails_is_named_with_the_way_out(monkeypatch, kind):
    def fail(*arguments, **keywords):
        raise kind("no compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(RecipeError, match=r'no compiler found\. Set run\.compile = "off"'):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("is_asked", [True, False])
def test_the_compiler_knows_whether_determinism_is_asked_for(is_asked):
    import torch._inductor.config as settings

    before = torch.get_deterministic_debug_mode(), settings.deterministic
    try:
        torch.set_deterministic_debug_mode("error" if is_asked else "default")
        settings.deterministic = not is_asked
        LayerCompiler("eager")
        assert settings.deterministic is is_asked
        assert torch.are_deterministic_algorithms_enabled() is is_asked
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.deterministic = before[1]
