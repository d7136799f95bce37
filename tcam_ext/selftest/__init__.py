"""The self-test: ``python -m tcam_ext.selftest``."""
