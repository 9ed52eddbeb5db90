"""A page on what adapters are: norms, spectra, which layers moved, how alike they are."""
