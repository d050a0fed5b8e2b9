"""One file for each kind of picture: values in, HTML out; no script, no network."""
