"""What may come next: proposals of tokens that the target checks several at a time."""
