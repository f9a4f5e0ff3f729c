"""bylaw: Constitutional AI from a written constitution to a trained checkpoint."""

__version__ = "0.1.0"
