"""What EPSD is compared with for its cost: a teacher, pruned in rounds, distilled."""
