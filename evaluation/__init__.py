"""What evaluate.py is made of: ground truth, metrics, statistics, and the files they go into."""
