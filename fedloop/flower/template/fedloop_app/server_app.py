"""The server's half. The defence, the rule and the checkpoints are configured in config.toml."""

from fedloop.flower import server_app

app = server_app()
