"""Watch a model run and write a Trace: the recorder, and the tasks that feed it."""
