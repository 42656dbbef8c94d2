"""kopf: watches feed the cache. No handler decides, writes or raises."""
