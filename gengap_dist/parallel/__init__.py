"""How a network is held and computed on many ranks: strategies, precision, layout, memory."""
