"""Everything between a data set and the model: extraction, the feature file, packing. Encoders are handed in, never imported."""
