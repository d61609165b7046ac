"""Settings: sections, loading, and comparison of the settings of two runs. Imports no torch."""
