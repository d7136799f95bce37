"""Demo behind ``make demo``."""
