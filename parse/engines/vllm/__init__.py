"""A vLLM server that the replica starts and supervises."""
