"""The network, its loss, and the names of its parts."""
