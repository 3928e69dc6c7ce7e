"""What train.py is made of: options, data, set-up, batches, optimizer, state of a run, its log, validation."""
