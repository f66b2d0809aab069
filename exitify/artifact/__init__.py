"""The one file: container, manifest, graphs, tensors. FORMAT.md specifies it."""
