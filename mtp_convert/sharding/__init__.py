"""Which rank holds which part of a tensor: parallel sizes, pipeline stages, and the cuts of tensor parallelism."""
