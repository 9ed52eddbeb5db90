"""Everything that touches Flower's non-public modules."""
