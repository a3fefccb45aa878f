#!/bin/sh
# Process 1 of the guest that plays the host: loads the kernel's vsock for hosts, runs what the disk says, ends.
# Its lines go to the console, which the test reads; the exit status is the last of them.
export PATH=/usr/bin LANG=C.UTF-8 HOME=/root QEMU_MODULE_DIR=/usr/lib/x86_64-linux-gnu/qemu
busybox mount -t proc proc /proc
busybox mkdir -p /dev/shm
for place in /run /tmp /dev/shm; do
    busybox mount -t tmpfs -o mode=1777 tmp "$place"
done
busybox ifconfig lo up 2>/dev/null
while read -r module; do
    busybox insmod "/lib/kenaz-host/$module.ko" 2>/dev/null
done </lib/kenaz-host/order
. /lib/kenaz-host/run
echo "kenaz-host: status $?"
busybox poweroff -f
