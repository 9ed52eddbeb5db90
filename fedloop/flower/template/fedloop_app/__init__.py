"""The two halves of a fedloop federation on Flower."""
