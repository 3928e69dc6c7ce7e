"""What is read afterwards: metrics and plots."""
