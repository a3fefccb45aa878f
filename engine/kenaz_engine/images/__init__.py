"""Images and the disks made from them: finding, fetching, overlays, and the config disk."""
