"""Stage 1: feature planes of a volume and the decoder that reads them (TCAM-Diff, AAAI 2025)."""
