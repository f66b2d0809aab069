"""Heads that learn on the device from deeper exits: the update, and the state that keeps it. NumPy alone."""
