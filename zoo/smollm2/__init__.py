"""SmolLM2-135M-Instruct: teaching it to refuse, labelled adapters of it, and their probes."""
