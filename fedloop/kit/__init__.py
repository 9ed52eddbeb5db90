"""A probe for a base model: labelled clients, studies, probe, card and record."""
