"""The clients' half, for nodes that are started with plain `flower-supernode`.

`fedloop flower node` runs its own copy.
"""

from fedloop.flower import client_app

app = client_app()
