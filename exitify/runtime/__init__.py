"""What runs on the device: NumPy and an engine."""
