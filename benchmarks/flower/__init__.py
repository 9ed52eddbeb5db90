"""What a round on Flower costs."""
