#!/bin/sh
# The remote shell of rsync in the appliance: the other end of the port is a sender that the host has
# started. What rsync asks for in its arguments is not passed on.
exec 3<> /dev/virtio-ports/kvmsnap.tree
cat <&3 &
reader=$!
cat >&3
kill $reader
