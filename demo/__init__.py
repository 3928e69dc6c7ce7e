"""The demo world: pictures drawn by program with captions known to be true, and the tiny models trained on them."""
