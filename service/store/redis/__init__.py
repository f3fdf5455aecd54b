"""Sessions in Redis: standalone, behind Sentinel, or a Cluster."""
