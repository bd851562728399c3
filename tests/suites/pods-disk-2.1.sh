#!/usr/bin/env bash
# Pods whose containers have a disk each, by containerd's blockfile snapshotter, on containerd 2.1.
#
# NUTSHELL_TEST_FILTER chooses cases by a part of their names.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/pods.bash"
source "$(dirname "$0")/../cases/pods.bash"
start_node 2.1 busybox

handler=nutshell-disk
disk_cases
finish
