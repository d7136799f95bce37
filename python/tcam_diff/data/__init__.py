"""Volumes in and out of files."""
