"""Large-batch training on many ranks, with near-rank loss measured during training.

Importing it imports no large package: torch, matplotlib and mlflow are imported by the modules that need them.
"""

__version__ = "0.1.0"
