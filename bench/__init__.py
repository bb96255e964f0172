"""Measurements that anyone can run again: ratios, side by side in one run."""
