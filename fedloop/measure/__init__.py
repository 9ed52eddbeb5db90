"""What is measured of a global model."""
