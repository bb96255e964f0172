"""Token-level speculation: several tokens per forward pass of the target.

It never changes the output of a target. A draft model may use proposed tokens unchecked.
"""
