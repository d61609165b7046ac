"""Workarounds for defects of other packages, one file each; each states when it becomes unnecessary."""
