"""One module per token-level method, and the modules that several methods share."""
