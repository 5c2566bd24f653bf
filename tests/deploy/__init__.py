"""The image, the compose file, the Kubernetes manifests, the alerts and the dashboard, looked at and run."""
