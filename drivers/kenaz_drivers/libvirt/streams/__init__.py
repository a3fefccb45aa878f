"""Carries streams of a libvirt on another host: a domain's console and channel, and files into its pool."""
