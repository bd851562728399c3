#!/usr/bin/env bash
# All cases of virtual machines that boot the disk in their image, on containerd 2.1.
# Takes about 10 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"
source "$(dirname "$0")/../cases/vms_hostile.bash"
source "$(dirname "$0")/../cases/vms_reboots.bash"

"$(dirname "$0")/../lab/need" binutils qemu-utils
kernels=$("$(dirname "$0")/../pc/kernels")
set_up_containerd 2.1 debian vm-raw vm-qcow2 vm-zstd
snapshotter=overlayfs

vm_cases
soak_vm_cases
vm_reboot_cases
hostile_vm_cases
finish
