"""The Ray Serve deployments: router, drafter and verifier replicas, and the calls between them."""
