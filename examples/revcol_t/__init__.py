"""RevCol-T, with a place for an exit after each column."""
