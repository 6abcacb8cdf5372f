"""Train: the paper's stages as Ray Train workers."""
