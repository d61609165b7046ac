"""Workarounds for faults and gaps of other packages, one small file each, naming the version that ends it."""
