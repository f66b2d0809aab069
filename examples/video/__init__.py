"""A video answered as a stream, in which an answer is held while it still holds."""
