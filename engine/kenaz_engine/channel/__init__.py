"""The channel between guest and harness: framing, protocol, policy, transports, relay.

`framing`, `strict_json`, `protocol` and `policy` do no IO; `connection`, `harness`, `relay` and `transports`
join them to trio. The wire is written down in docs/reference/vsock-protocol.md.
"""
