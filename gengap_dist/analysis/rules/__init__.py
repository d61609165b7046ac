"""The rules by which a study is judged: one file for each claim, and what they share. See docs/statistics.md."""
