"""The benchmark: what an operator costs on the device at hand, and what else there is. Nothing is
timed that has not passed its correctness gate."""
