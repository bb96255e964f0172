"""How the pipeline reaches a model: the protocols, and one package per engine."""
