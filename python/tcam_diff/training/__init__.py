"""What both stages of training share: streams of random numbers, ranks, checkpoints, the loop, its records."""
