#!/usr/bin/env bash
# A guest's kernel that attacks its machine, on both boards. On containerd 2.1.
# Takes about 21 minutes.
#
# Environment:
#   NUTSHELL_TEST_HOSTILE_SECONDS  how long each board is attacked, default 600
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"
source "$(dirname "$0")/../cases/hostile_kernel.bash"
hostile_kernel=$("$(dirname "$0")/../hostile/build")
set_up_containerd 2.1 busybox
snapshotter=overlayfs image=busybox
hostile_seconds=${NUTSHELL_TEST_HOSTILE_SECONDS:-600}

hostile_kernel_cases
finish
