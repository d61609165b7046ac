"""Where a step's time goes: clocks on some steps, torch's profiler on the next, and a summary of one screen."""
