"""Tables of measured times, from the committed results of the benchmark."""
