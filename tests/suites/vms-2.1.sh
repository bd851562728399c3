#!/usr/bin/env bash
# Virtual machines that boot the disk in their image, with unmodified kernels of Debian, on containerd 2.1.
# Takes about 4 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"

"$(dirname "$0")/../lab/need" qemu-utils
kernels=$("$(dirname "$0")/../pc/kernels")
set_up_containerd 2.1 vm-raw vm-qcow2 vm-zstd
snapshotter=overlayfs

check "raw disk boots" raw_disk_boots
check "qcow2 disk with zlib boots" qcow2_disk_with_zlib_boots
check "qcow2 disk with zstd boots" qcow2_disk_with_zstd_boots
check "reboot in the guest boots the same disk again" reboot_in_the_guest_boots_the_same_disk_again
check "reboot ends the task if on-reboot is exit" reboot_ends_the_task_if_on_reboot_is_exit
check "kill ends the machine at once" kill_ends_the_machine_at_once
check "console without a reader does not stall the guest" console_without_a_reader_does_not_stall_the_guest
check "exec fails at once and names the console" exec_fails_at_once_and_names_the_console
check "unusable images are refused with the reason" unusable_images_are_refused_with_the_reason
check "kernel and initrd of a mount boot without a disk" kernel_and_initrd_of_a_mount_boot_without_a_disk
check "full snapshot is only an I/O error in the guest" full_snapshot_is_only_an_io_error_in_the_guest
finish
