"""Ranks: their process group, what each does and when, how a batch is cut over them, and who starts them."""
