"""The speed of the package beside that of others: one driver, and workers that measure in environments of their own."""
