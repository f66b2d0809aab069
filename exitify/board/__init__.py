"""Boards that measure kernels for another machine, and the tracker at which they register."""
