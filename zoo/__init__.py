"""The zoo: a small base model, labelled adapters, pretrained probes, and how all of them are made."""
