"""Large-batch training across ranks, with near-rank loss measured while it trains.

Importing this package imports nothing heavy: torch, matplotlib and mlflow are imported by the modules that need them.
"""

__version__ = "0.1.0"
