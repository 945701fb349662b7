"""What the operations stand on: compiling, caching, threads, checks, vectors, panels, the register tile."""
