"""Memory: planned before a run, counted during it."""
