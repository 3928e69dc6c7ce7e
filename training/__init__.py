"""What train.py is made of: options, optimiser and schedule, resume state, the run's log."""
