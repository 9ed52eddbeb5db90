"""How well clients can be told apart by what they train on."""
