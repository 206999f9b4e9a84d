"""Where gradients go: routes, the hooks that feed them, the kept norm."""
