"""EPSD: early pruning with self-distillation. A small vision network without a big one first."""
