"""The edge: the only places that talk to the API server, to pods, to Prometheus and to the clock."""
