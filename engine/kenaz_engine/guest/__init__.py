"""The guest's side: the agent that runs inside the machine, and the builder of the demo image."""
