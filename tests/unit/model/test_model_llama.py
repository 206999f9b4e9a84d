from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model, equal_to_initial
from blockllm_cli.model.weights import load_weights

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def config_of(**change):
    return LlamaConfig(**(SMALL | change))


def batch_of_labels(input_ids, labels):
    """Batch whose target at position i is `labels` at i + 1, -100 being none: Hugging Face's shifted labels."""
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    positions = (following.flatten() != -100).nonzero()[:, 0]
    return Batch(input_ids, None, positions, following.flatten()[positions])


def random_batch(rows=3, length=12, vocab=64, seed=0):
    ids = torch.randint(vocab, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), None, torch.arange(rows * length), ids[:, 1:].flatten())


def train(model, batch):
    model.zero_grad()
    loss, _ = model.loss(batch, scale=1 / batch.num_targets)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("llama_tiny")


@pytest.fixture
def tiny(recorded):
    model = build_model(config_of(), seed=0)
    stored = {name.removeprefix("param."): value for name, value in recorded.items() if name.startswith("param.")}
    load_weights(model, stored)
    return model


@pytest.mark.parametrize("case", ["full", "padded"])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_numbers_are_those_of_hugging_face(tiny, recorded, case, checkpoint_activations):
    tiny.model.checkpoint_activations = checkpoint_activations
    input_ids, labels = recorded[f"{case}.input_ids"], recorded[f"{case}.labels"]
    valid = recorded[f"{case}.attention_mask"].bool()

    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in tiny.model.layers]
    final = tiny.model(input_ids)
    for hook in hooks:
        hook.remove()
    for index, hidden in enumerate([*seen, final]):
        expected = recorded[f"{case}.hidden.{index}"]
        torch.testing.assert_close(hidden[valid], expected[valid], atol=4e-6, rtol=1e-5)
    logits = tiny(input_ids)
    torch.testing.assert_close(logits[valid], recorded[f"{case}.logits"][valid], atol=4e-6, rtol=1e-5)

    batch = batch_of_labels(input_ids, labels)
    loss, gradients = train(tiny, batch)
    torch.testing.assert_close(loss, recorded[f"{case}.loss"].squeeze(), atol=2e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, recorded[f"{case}.grad.{name}"], atol=2e-6, rtol=1e-5)

    nll, counts = tiny.row_nll(batch)
    torch.testing.assert_close(nll, recorded[f"{case}.nll"].double().sum(1), atol=1e-5, rtol=1e-6)
    assert counts.tolist() == (recorded[f"{case}.nll"] != 0).sum(1).tolist()


@pytest.mark.parametrize("change", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True, "rope_theta": 5e5}])
def test_logits_are_those_of_transformers(change):
    transformers = pytest.importorskip("transformers")
    config = config_of(**change, initializer_range=0.2)
    model = build_model(config, seed=5)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **(SMALL | change),
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    batch = random_batch(length=30)
    with torch.no_grad():
        torch.testing.assert_close(model(batch.input_ids), theirs(batch.input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_the_config(tied):
    config = config_of(tie_word_embeddings=tied, num_key_value_heads=2)
    model = build_model(config, seed=0)
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(named.items()) == list(config.parameter_shapes().items())
    assert list(model.state_dict()) == list(named)
    assert (model.head_weight is model.model.embed_tokens.weight) == tied
    model(random_batch().input_ids)
    assert list(model.state_dict()) == list(named)


def test_initial_weights_depend_on_seed_and_name_alone():
    """R30: the weights' seed decides them, whatever the dtype, the number of layers or what was drawn before."""
    one, deeper = build_model(config_of(), seed=7), build_model(config_of(num_hidden_layers=3), seed=7)
    torch.rand(5)
    rounded = build_model(config_of(), seed=7, dtype=torch.bfloat16)
    other = build_model(config_of(), seed=8)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, deeper.get_parameter(name))
        assert torch.equal(parameter.bfloat16(), rounded.get_parameter(name))
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(32))
        else:
            assert not torch.equal(parameter, other.get_parameter(name))
            assert abs(parameter.std().item() / 0.02 - 1) < 0.1
    values = [parameter[0, :8] for name, parameter in one.named_parameters() if "norm" not in name]
    assert len({tuple(value.tolist()) for value in values}) == len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_do_not_see_each_other(dtype):
    model = build_model(config_of(num_key_value_heads=2, initializer_range=0.2), seed=1, dtype=dtype)
    draw = torch.Generator().manual_seed(4)
    first, second = torch.randint(64, (1, 5), generator=draw), torch.randint(64, (1, 7), generator=draw)
    packed = torch.cat((first, second), 1)
    documents = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    alone, beside = model(first), model(packed, documents)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # other angles round otherwise in bf16
    torch.testing.assert_close(beside[:, :5], alone, atol=tolerance, rtol=tolerance)
    # Rotary attention depends on distances only, so the second document's logits are those of its own row.
    torch.testing.assert_close(beside[:, 5:], model(second), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(model(packed)[:, 5:], beside[:, 5:], atol=0.5)
    packed[0, 0] = (packed[0, 0] + 1) % 64
    assert torch.equal(model(packed, documents)[:, 5:], beside[:, 5:])


def test_padding_ids_change_nothing():
    model = build_model(config_of(), seed=1)
    batch = random_batch(rows=2, length=8)
    keep = batch.positions[batch.positions % 8 < 5]
    targets = batch.targets[keep]
    results = []
    for padding in (0, 63):
        ids = batch.input_ids.clone()
        ids[:, 5:] = padding
        results.append(train(model, Batch(ids, None, keep, targets)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name])


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = build_model(config_of(), seed=1)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(torch.randint(64, (2, 4)), None, nothing, nothing)
    loss, total = model.loss(batch, scale=0.1)
    loss.backward()
    assert loss == total == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert model.row_nll(batch)[1].tolist() == [0, 0]


@pytest.mark.parametrize("frozen", [(), ("model.embed_tokens", "model.layers.0"), ("lm_head", "model.norm")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit(frozen, dtype):
    results = []
    for checkpoint_activations in (False, True):
        model = build_model(
            config_of(num_hidden_layers=3), seed=1, dtype=dtype, checkpoint_activations=checkpoint_activations
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen or "none"))
        loss, _ = model.loss(random_batch(), scale=1.0)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept_bytes(checkpoint_activations):
        model = build_model(config_of(), seed=1, checkpoint_activations=checkpoint_activations)
        storages = {}
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            if tensor.data_ptr() not in weights:
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(random_batch(rows=8).input_ids)
        return sum(storages.values())

    assert kept_bytes(True) < 0.3 * kept_bytes(False)


@pytest.mark.parametrize("share", [1, 2])
def test_hidden_states_are_gathered_only_where_positions_lack_a_target(share):
    model, batch = build_model(config_of(), seed=1), random_batch()
    part = Batch(batch.input_ids, None, batch.positions[::share], batch.targets[::share])
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model.loss(part, scale=1.0)
    # The embedding is a gather too.
    assert sum(event.name == "aten::index_select" for event in seen.events()) == share


def test_the_backward_pass_makes_no_product_for_frozen_weights():
    model = build_model(config_of(), seed=1)
    batch = random_batch()

    def flops():
        with FlopCounterMode(display=False) as counted:
            model.loss(batch, scale=1.0)[0].backward()
        return counted.get_total_flops()

    everything = flops()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    assert everything - flops() == 2 * batch.num_targets * 32 * 88


def test_row_losses_do_not_depend_on_the_batch():
    """R04: rows are scored alike alone and together."""
    model = build_model(config_of(initializer_range=0.2), seed=1)
    batch = random_batch(rows=7)
    whole, counts = model.row_nll(batch)
    assert counts.tolist() == [12] * 7
    assert whole.dtype == torch.float64
    for row in range(7):
        ids, targets = batch.input_ids[row : row + 1], batch.targets.view(7, 12)[row]
        alone, _ = model.row_nll(Batch(ids, None, torch.arange(12), targets))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-6, atol=0)
    loss, total = model.loss(batch, scale=1.0)
    torch.testing.assert_close(total, whole.sum(), rtol=1e-6, atol=0)
    assert loss.requires_grad


def test_training_after_evaluation_is_unmoved_by_it():
    batch = random_batch()
    undisturbed = train(build_model(config_of(), seed=1), batch)
    model = build_model(config_of(), seed=1)
    model.row_nll(random_batch(length=20, seed=3))
    loss, gradients = train(model, batch)
    assert torch.equal(loss, undisturbed[0])
    assert all(torch.equal(gradient, undisturbed[1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_as_it_was_drawn_is_found_tensor_by_tensor(dtype):
    model = build_model(config_of(), seed=5, dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    assert equal_to_initial(model, names, seed=5) == names
    assert equal_to_initial(model, names, seed=6) == [name for name in names if name.endswith("norm.weight")]
    moved = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(moved)[-1, -1] += 1
    assert equal_to_initial(model, names, seed=5) == [name for name in names if name != moved]
    assert equal_to_initial(model, [moved], seed=5) == []
