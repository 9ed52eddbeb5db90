"""Which way to read a client's evidence tells malicious clients from honest ones."""
