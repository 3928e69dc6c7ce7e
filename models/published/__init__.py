"""What exists only so that published weight files work: their names, shapes, sizes, and CLIPxGPT's own decoding."""
