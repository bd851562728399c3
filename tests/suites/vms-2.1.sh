#!/usr/bin/env bash
# Virtual machines that boot the disk in their image, with an unmodified kernel of Debian, and a kernel that attacks its
# machine. On containerd 2.1.
# Takes about 3 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"
source "$(dirname "$0")/../cases/hostile_kernel.bash"

"$(dirname "$0")/../lab/need" qemu-utils
kernels=$("$(dirname "$0")/../pc/kernels")
hostile_kernel=$("$(dirname "$0")/../hostile/build")
set_up_containerd 2.1 busybox vm-raw vm-zstd
snapshotter=overlayfs

vm_cases
image=busybox hostile_seconds=15
hostile_kernel_cases
finish
