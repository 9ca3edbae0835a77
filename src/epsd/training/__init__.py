"""A mask becomes a trained network: the loop, its recipe, its checkpoints."""
