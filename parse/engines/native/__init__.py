"""Our engine for unmodified Hugging Face causal language models."""
