"""A run against the loop anyone would write: plain logits, torch's cross-entropy, torch's AdamW with two groups."""

import numpy as np
import torch
import torch.nn.functional as F

from blockllm_cli.data.batches import batch_of
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.stream import RowStream
from blockllm_cli.data.tokenizer import load_tokenizer
from blockllm_cli.methods.resolve import resolve_recipe
from blockllm_cli.model.config import llama_config
from blockllm_cli.model.llama import build_model
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from blockllm_cli.runner.inputs import stream_settings


def test_losses_and_weights_are_those_of_a_plain_loop(tiny):
    result = tiny.run("schedule.dense_rate=1e-2", "schedule.clip=0.5", method="adamw:betas=[0.9,0.95],weight_decay=0.1")
    recipe = resolve_recipe(result.folder / "recipe.toml").recipe
    cpu = torch.device("cpu")
    model = build_model(
        llama_config(recipe.model, tokenizer_vocab_size=300), seed=recipe.model.seed, dtype=torch.float32, device=cpu
    )
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[role_of(name) in DENSE_ROLES].append(parameter)
    peaks = {True: 1e-2, False: 3e-3}
    optimizer = torch.optim.AdamW(
        [{"params": groups[dense], "dense": dense} for dense in groups], betas=(0.9, 0.95), weight_decay=0.1
    )
    stream = RowStream(
        Corpus(tuple(sorted(tiny.corpus.glob("train-*.jsonl")))),
        load_tokenizer(tiny.tokenizer),
        settings=stream_settings(recipe),
    )
    losses, norms = [], []
    for step in range(1, 21):
        batch = batch_of(stream.take(8).rows, cpu)
        loss = F.cross_entropy(model(batch.input_ids, batch.documents).flatten(0, 1)[batch.positions], batch.targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        progress = (step - 4) / 16
        factor = step / 4 if step <= 4 else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = peaks[group["dense"]] * factor
        optimizer.step()
        losses.append(loss.item())
    stream.close()
    assert max(norms) > 0.5, "the clip must have acted"
    np.testing.assert_allclose(result.column("train/loss"), losses, rtol=1e-5)
    np.testing.assert_allclose(result.column("train/gradient_norm"), norms, rtol=1e-4)
    weights = result.tensors()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=2e-4)
