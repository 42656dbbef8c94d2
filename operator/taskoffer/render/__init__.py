"""From decisions to objects: pure functions that return what is sent to the API server."""
