"""PARSE: a small model drafts a whole answer, a large one judges every prefix of it in a single forward pass."""
