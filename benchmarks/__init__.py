"""Worlds and measurements: the village, where the truth is known by construction."""
