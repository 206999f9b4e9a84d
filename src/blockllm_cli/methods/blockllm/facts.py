"""What BlockLLM says about itself."""

from blockllm_cli.methods.base import Cycle, Hyperparameters, MethodFacts

FACTS = MethodFacts(
    title="BlockLLM",
    summary="Trains the coordinate blocks with the largest gradient norm over visit frequency, keeps Adam state for "
    "their entries only, and selects anew when the loss stops falling.",
    paper="Ramesh, Ganapathiraman, Laradji, Schmidt, BlockLLM: Memory-Efficient Adaptation of LLMs by Selecting and "
    "Optimizing the Right Coordinate Blocks, 2024, arXiv 2406.17296",
    family="block coordinate",
    variants=("recommended", "paper", "official"),
    keeps="the gradient of the entries that are trained; a sketch of one other block at a time; of a masked block the "
    "whole gradient in the update that chooses its mask",
    layerwise="scale_invariant",
    cycle=Cycle(
        updates=40,
        options={"score": "cyclic", "sparsity": 0.5, "max_interval": 3, "always": (), "norms": "compete"},
    ),
    hyperparameters={
        "9m": Hyperparameters(learning_rate=3e-4, dense_rate=1e-2, source="ours, from a short search"),
        "60m": Hyperparameters(learning_rate=1e-3, source="ours, not tuned"),
        "130m": Hyperparameters(learning_rate=1e-3, source="ours, not tuned"),
        "350m": Hyperparameters(learning_rate=6e-4, source="ours, not tuned"),
        "1b": Hyperparameters(learning_rate=4e-4, source="ours, not tuned"),
        "7b": Hyperparameters(learning_rate=3e-4, source="ours, not tuned"),
    },
    limits=(
        "With mask = none only whole blocks that fit into the budget train, so a small budget reaches few blocks at a "
        "time.",
        "A mask costs the whole gradient of its block once, when it is chosen, and index bytes; it is for small "
        "densities.",
        "The inactive rules go beyond the paper; with more than one micro-batch per update they need a dense gradient "
        "of every candidate.",
        "Entries without state do not decay.",
    ),
)
