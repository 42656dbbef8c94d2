"""Replays offers against policies with a virtual clock: what a policy would have accepted, finished and earned."""
