"""Differences, gradients, and the methods that fit a direction to them."""
