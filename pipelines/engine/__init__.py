"""Ray and this machine: connecting, work in shards."""
