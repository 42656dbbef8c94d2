"""What a policy earns on a trace of tasks, replayed in virtual time, and what could have been earned at best."""
