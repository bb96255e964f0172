"""Token-level speculation: several tokens of the target per forward pass, without changing its output."""
