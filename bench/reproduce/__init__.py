"""Compares PARSE with vLLM alone on equal hardware, and writes a report."""
