"""A session as bytes: the only place with offsets."""
