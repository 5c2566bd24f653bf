"""The image, the compose file and the Kubernetes manifests, looked at and run."""
