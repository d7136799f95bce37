"""What both stages of training share: random numbers, processes, checkpoints, the loop, its log."""
