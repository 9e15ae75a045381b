"""What it takes on real clusters: files for Ray's autoscaler, KubeRay and SLURM, an image, and `submit`."""
