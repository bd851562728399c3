#!/usr/bin/env bash
# All cases of virtual machines that boot the disk in their image, on containerd 2.1.
# Takes about 5 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"

"$(dirname "$0")/../lab/need" qemu-utils
kernels=$("$(dirname "$0")/../pc/kernels")
set_up_containerd 2.1 debian vm-raw vm-qcow2 vm-zstd
snapshotter=overlayfs

vm_cases
more_vm_cases
finish
