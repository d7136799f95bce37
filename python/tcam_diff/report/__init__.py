"""The page behind ``tcam report``: volumes in a viewer, tables, curves, and where they come from, in one HTML file."""
