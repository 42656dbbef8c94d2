"""The shell: gather what is, ask the core what to do, apply it."""
