"""Benchmarks: ratios against MONAI and Captum doing the same, measured side by side in one run."""
