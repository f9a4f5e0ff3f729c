"""The village: a small generated world on which the whole of Constitutional AI runs on a laptop CPU."""
