"""Clips and captions: manifests, decoding, cropping, buckets, feature shards and their loader."""
