"""Runs one causal language model for many requests at once. Knows nothing of drafts, HTTP or Ray."""
