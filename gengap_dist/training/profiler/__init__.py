"""Where the time of a step goes: a trace of every rank and a summary on one screen."""
