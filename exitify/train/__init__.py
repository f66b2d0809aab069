"""Training of what was added, never of what was given."""
