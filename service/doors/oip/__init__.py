"""Open Inference Protocol v2: what its requests mean to sessions. Knows no HTTP and no protobuf; both doors use it."""
