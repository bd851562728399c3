#!/usr/bin/env bash
# Virtual machines that boot the disk in their image, with an unmodified kernel of Debian, on containerd 2.1.
# Takes about 2 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"

"$(dirname "$0")/../lab/need" qemu-utils
kernels=$("$(dirname "$0")/../pc/kernels")
set_up_containerd 2.1 vm-raw vm-zstd
snapshotter=overlayfs

vm_cases
finish
