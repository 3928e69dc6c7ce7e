"""Everything with weights: encoders, mappers, the captioner, decoding, checkpoints. Imports nothing else of this project but common."""
