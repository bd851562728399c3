#!/usr/bin/env bash
# Pods that are virtual machines, on containerd 2.1: the cases that pods-vm-2.1 leaves out.
# Takes about 4 minutes.
#
# Environment:
#   NUTSHELL_TEST_FILTER  runs only the cases whose name contains it
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
# As systemd does: containerd mounts image volumes after the start of the shim.
mount --make-rshared /
start_node 2.1 busybox vm-raw

handler=nutshell
soak_vm_cases
finish
