"""What shows a run afterwards: plots, grids of pictures, and a page."""
