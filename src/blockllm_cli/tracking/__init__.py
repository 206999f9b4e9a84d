"""Where metrics go: files, terminal."""
