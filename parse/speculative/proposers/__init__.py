"""One module per token-level method, and what these modules share."""
