"""The same training in three loops: PyTorch's own, accelerate's, Lightning's."""
