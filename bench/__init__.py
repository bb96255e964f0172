"""Benchmarks that anyone can run again. Each compares its contenders side by side in one run."""
