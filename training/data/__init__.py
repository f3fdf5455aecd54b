"""Series to padded batches with masks."""
