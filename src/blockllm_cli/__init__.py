"""An experiment runner for memory-efficient pretraining of Llama-style models."""

__version__ = "0.1.0"
