"""Update rules as pure functions on tensors, and the state they need."""
