"""People who drive."""

LICENSED = ["Ada", "Grace"]
