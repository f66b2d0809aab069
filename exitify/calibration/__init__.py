"""When to stop, from recorded outputs: NumPy alone, so that a device can do it too."""
