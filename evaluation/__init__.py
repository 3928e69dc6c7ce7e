"""What evaluate.py is made of: ground truth, metrics, statistics and output files."""
