"""The same training in loops that users have: PyTorch's own in four ways, accelerate's, the Trainer's, Lightning's."""
