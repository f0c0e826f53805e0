"""Prompts to batches; the model run, in part and as a whole, at the cost of its arithmetic."""
