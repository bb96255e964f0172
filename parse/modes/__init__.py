"""The modes: one module each, with a coroutine `run` that answers one request.

`parse.registry` lists them.
"""
