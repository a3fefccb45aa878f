#!/bin/busybox sh
# Process 1 of the demo image: starts the agent, keeps it running, and ends the machine.
#
# The agent's exit status: 0 or 10 power off, 11 reboot, anything else is a crash and it is started again.
PATH=/bin:/usr/bin
# A fixed hash seed: the kernel has no entropy yet, and would spend a second on gathering it for Python.
# -s -P -S instead of -I, which would ignore the seed.
export PATH LANG=C.UTF-8 PYTHONHASHSEED=0
busybox mount -t proc proc /proc
read -r KENAZ_CLOCK_INIT _ </proc/uptime
export KENAZ_CLOCK_INIT
busybox mount -t tmpfs -o mode=0755,nosuid,nodev run /run
busybox mkdir -p -m 0700 /run/kenaz/meta
busybox mount -o move /mnt /run/kenaz/meta 2>/dev/null

# The workbench's build, where one is attached: a disk that nobody can write to.
workbench() {
    while read -r module; do
        busybox insmod "/lib/kenaz/$module.ko" || echo "kenaz: module $module does not load"
    done </lib/kenaz/workbench.order
    busybox mkdir /run/kenaz/workbench
    busybox mount -o ro,nosuid,nodev "/dev/$1" /run/kenaz/workbench 2>/dev/null ||
        echo "kenaz: the workbench's build on $1 holds no file system that is known here"
}
for path in /sys/block/vd*; do
    read -r serial <"$path/serial" # which does not end in a newline, so this is not true
    [ "$serial" != KENAZWB ] || workbench "${path##*/}"
done

# `network: nat`: the addresses are QEMU's own (user networking), and always the same.
if [ -e /sys/class/net/eth0 ]; then
    busybox ip link set lo up
    busybox ip addr add 10.0.2.15/24 dev eth0
    busybox ip link set eth0 up
    busybox ip route add default via 10.0.2.2
    echo 'nameserver 10.0.2.3' >/etc/resolv.conf
fi

supervise() {
    tenths=1
    while :; do
        python3.11 -s -P -S /usr/lib/kenaz/agent.py --env /run/kenaz/meta/kenaz.env --machine
        status=$?
        case $status in
            0 | 10) kill -USR1 1 && return ;;
            11) kill -USR2 1 && return ;;
        esac
        echo "kenaz: agent ended with status $status; starting it again"
        busybox usleep "${tenths}00000"
        tenths=$((tenths < 32 ? tenths * 2 : 50))
    done
}

# Waits for the power button. Nothing but a key press ever comes from that device.
button() {
    for event in /sys/class/input/event*; do
        [ -e "$event" ] || return
        read -r name <"$event/device/name"
        case $name in
            'Power Button' | gpio-keys)
                busybox dd "if=/dev/input/${event##*/}" of=/dev/null bs=24 count=1 2>/dev/null
                [ -e /run/kenaz/ignore-button ] || kill -USR1 1
                return
                ;;
        esac
    done
}

finish() {
    trap '' USR1 USR2
    busybox sync
    busybox "$1" -f
}

trap 'finish poweroff' USR1
trap 'finish reboot' USR2
supervise </dev/null &

# What the agent can do without comes after its start, and yields to it.
later() {
    busybox renice -n 19 -p "$1" >/dev/null
    busybox mount -t tmpfs -o mode=1777,nosuid,nodev tmp /tmp
    while read -r module; do
        busybox insmod "/lib/kenaz/$module.ko" || echo "kenaz: module $module does not load"
    done </lib/kenaz/order
    button
}
(read -r pid _ </proc/self/stat && later "$pid") &

# The shell reaps what is orphaned whenever it waits; a signal ends the wait and runs its trap.
while :; do
    wait
    busybox sleep 1
done
