"""One module for each thing that is measured; each runs as a process and speaks `protocol` with the driver."""
