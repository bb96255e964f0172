"""The tasks of `bench.quality`: their problems, and how their answers are graded."""
