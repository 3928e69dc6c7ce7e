"""Captioning many things at once: what predict.py and evaluate.py share."""
