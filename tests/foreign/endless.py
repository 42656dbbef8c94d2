"""The same, but that it never ends: it knows no deadline."""

import threading

import train

train.main()
print("trained, and now for the rest of my life", flush=True)
threading.Event().wait()
