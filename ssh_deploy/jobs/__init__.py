"""One whole job per CLI command, callable from Python."""
