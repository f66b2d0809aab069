"""Networks under names that any process can import, which handing a module to another process takes."""

from __future__ import annotations

from benchmarks.zoo import define_missing_operators

define_missing_operators()  # before torchvision, which does not import without them

from torchvision.models.resnet import Bottleneck, ResNet  # noqa: E402


class ResNet50(ResNet):
    """torchvision's, 25.6 M parameters."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
