"""Programs that run in the environment of the evaluation harnesses, without the other modules of this project."""
