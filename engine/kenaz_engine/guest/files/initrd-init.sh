#!/bin/busybox sh
# First process in the initrd: loads drivers, finds the root disk, hands over to /sbin/init there.
# Each command is a process, and a process costs some 5 ms under emulation: hence the shell's own words
# wherever they do.
PATH=/bin
busybox mount -t devtmpfs dev /dev
busybox mount -t sysfs sys /sys

emergency() {
    echo "kenaz: emergency: $1" >/dev/console
    busybox poweroff -f
}

# load GROUP: the modules that /modules/GROUP lists, in order.
load() {
    while read -r module; do
        busybox insmod "/modules/$module.ko" || echo "kenaz: module $module does not load" >/dev/console
    done <"/modules/$1.order"
}

# label NAME: what a disk is, by its serial number, or by its ISO 9660 label where there is no serial.
label() {
    read -r label <"/sys/block/$1/serial"
    [ -n "$label" ] || label=$(busybox dd "if=/dev/$1" bs=1 skip=32808 count=9 2>/dev/null)
}

load bus
set -- /sys/bus/pci/devices/*
[ -e "$1" ] && load pci
load mmio
for device in /sys/bus/virtio/devices/*; do
    read -r id <"$device/device"
    case $id in
        0x0001) [ -e /sys/bus/virtio/drivers/virtio_net ] || load net ;;
        0x0002) [ -e /sys/bus/virtio/drivers/virtio_blk ] || load block ;;
        0x0003) [ -e /sys/bus/virtio/drivers/virtio_console ] || load console ;;
        0x0010) [ ! -e /modules/gpu.order ] || load gpu ;;
        0x0013) [ -e /sys/bus/virtio/drivers/vmw_vsock_virtio_transport ] || load vsock ;;
    esac
done

# The order of vda, vdb, ... is not that of the command line on every machine: go by name.
root='' meta=''
for path in /sys/block/vd*; do
    [ -e "$path" ] || break
    disk=${path##*/}
    label "$disk"
    case $label in
        KENAZROOT) root=$disk ;;
        KENAZMETA) meta=$disk ;;
        KENAZWB) ;;
        *) root=${root:-$disk} ;;
    esac
done
[ -n "$root" ] || emergency 'no root disk among the virtio block devices'

if [ -e /modules/root.order ]; then
    load root
    busybox mount -t proc proc /proc
    read -r KENAZ_CLOCK_INIT _ </proc/uptime
    export KENAZ_CLOCK_INIT
fi
# The disk is thrown away at the end of the session: no time stamps of reading, no tables wiped.
busybox mount -t ext4 -o noatime,noinit_itable "/dev/$root" /root || emergency "$root does not mount as ext4"
if [ -n "$meta" ]; then
    load config
    busybox mount -t iso9660 -o ro,nosuid,nodev,noexec "/dev/$meta" /meta || emergency "$meta does not mount"
    busybox mount -o move /meta /root/mnt
fi
[ ! -e /proc/self ] || busybox mount -o move /proc /root/proc
busybox mount -o move /sys /root/sys
busybox mount -o move /dev /root/dev
exec busybox switch_root /root /sbin/init
