"""Kubernetes: names, pods and the API server, shared by the launchers that run there."""
