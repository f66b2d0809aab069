"""Handwritten digits, the whole way."""
