"""Models: load, prove, run in batches. Knows manifests and arrays, never sessions, stores or records."""
