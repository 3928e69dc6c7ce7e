"""What exists only so that published weight files work: their names, shapes and sizes, and the decoding of CLIPxGPT."""
