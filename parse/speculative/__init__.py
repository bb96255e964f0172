"""Token-level speculation: several tokens per forward pass of the target.

It never changes the output.
"""
