#!/usr/bin/env bash
# Single containers on containerd 1.7, which starts shims in the older way.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
start_containerd 1.7 busybox

all_cases "overlayfs"
check "100 MiB of stdin come back unharmed" stdin_comes_back_unharmed
check "killed vmm ends the container" killed_process_ends_the_container vmm
snapshotter=native
check "native: the guest's kernel answers" guest_kernel_answers
finish
