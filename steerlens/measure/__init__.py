"""What is measured on a model along directions: sweep, boundary, plane, comparison, tokens."""
