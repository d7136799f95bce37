"""The tables and figures of the paper as lists of ``tcam`` commands, and their rows beside the printed ones."""
