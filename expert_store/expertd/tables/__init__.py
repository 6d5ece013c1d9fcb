"""Tables of rows: which rows are in RAM, and reading the others."""
