"""`taskoffer-lab demo`: from TaskOffers to trained adapters on a cluster made for it."""

from taskoffer_lab.demo.run import main

__all__ = ["main"]
