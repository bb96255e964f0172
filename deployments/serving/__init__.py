"""The Ray Serve deployments, and the calls between their replicas.

There are three: router, drafter and verifier.
"""
