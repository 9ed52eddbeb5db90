"""What learns: heads, calibration, cuts."""
