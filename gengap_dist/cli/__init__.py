"""Commands: one file each. Only this package writes to the terminal."""
