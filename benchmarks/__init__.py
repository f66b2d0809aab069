"""The commands behind the figures."""
