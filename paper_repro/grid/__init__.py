"""Which defence leaves what of a federation's refusal, by attack, data and seed."""
