"""What differential privacy and secure aggregation leave of the defence."""
