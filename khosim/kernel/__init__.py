"""One kernel generation: it boots on a machine, runs and hands over."""
