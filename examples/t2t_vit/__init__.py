"""T2T-ViT, the network of JEI-DNN's experiments, with a place for an exit after each block."""
