"""What is timed: one module a family, with the inputs of its operators and a table of shapes."""
