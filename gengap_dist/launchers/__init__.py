"""Where ranks come from: started here, or by torchrun. Each ends in `run.run` on every rank."""
