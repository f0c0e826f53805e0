"""Contrastive pairs and preference items: read, checked, shipped."""
