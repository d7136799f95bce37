"""Reading, preparing and writing volumes."""
