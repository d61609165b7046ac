"""Settings: their sections, how they are read, and what makes two runs the same experiment. Without torch."""
