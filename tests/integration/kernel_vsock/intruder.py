"""A process of the host, by vsock_loopback, that dials where the launcher listens for its guest."""

import socket
import time

PORT = 7881
LOOPBACK = 1

for _ in range(1200):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as dialling:
        try:
            dialling.connect((LOOPBACK, PORT))
        except OSError:
            time.sleep(0.1)
            continue
        try:
            heard = dialling.recv(1)
        except ConnectionResetError:
            heard = b""
    print(f"intruder: heard {heard!r}", flush=True)
    break
