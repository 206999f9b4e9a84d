"""Recipes: TOML text to a checked, frozen description of one run."""
