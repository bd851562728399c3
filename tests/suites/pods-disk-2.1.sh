#!/usr/bin/env bash
# Pods whose containers each have a disk, from containerd's blockfile snapshotter, on containerd 2.1.
#
# Environment:
#   NUTSHELL_TEST_FILTER  runs only the cases whose name contains it
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
start_node 2.1 busybox

handler=nutshell-disk
disk_cases
finish
