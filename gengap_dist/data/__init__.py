"""Images and labels in memory, the order they are visited in, and how they become batches."""
