"""The zoo: a small base model, labelled adapters, probes, and how all of them are made."""
