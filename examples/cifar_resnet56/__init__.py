"""CIFAR-10's ResNet-56 with early exits."""
