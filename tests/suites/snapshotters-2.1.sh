#!/usr/bin/env bash
# The snapshotters that need some setup, on containerd 2.1: devmapper, with a thin pool on loop devices, and EROFS, whose
# layers containerd 2.1 mounts itself. Other suites run overlayfs, native and blockfile.
# Takes about 5 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"

# The snapshotter runs dmsetup, which would wait for udev.
export DM_DISABLE_UDEV=1
erofs_utils=$("$(dirname "$0")/../lab/erofs-utils")
export PATH=$erofs_utils:$PATH
modprobe -a erofs dm-thin-pool
mount -t tmpfs -o size=1500M tmpfs /mnt
truncate -s 1G /mnt/data
truncate -s 16M /mnt/metadata
data=$(losetup --find --show /mnt/data)
metadata=$(losetup --find --show /mnt/metadata)
# In sectors: the start, the size, and a block (kernel, Documentation/admin-guide/device-mapper/thin-provisioning.rst).
dmsetup create pool --table "0 $(blockdev --getsz "$data") thin-pool $metadata $data 128 2048 1 skip_block_zeroing"

CONTAINERD_CONFIG='[plugins."io.containerd.snapshotter.v1.devmapper"]
  root_path = "/run/containerd-root/devmapper"
  pool_name = "pool"
  base_image_size = "300MB"
  fs_type = "ext4"
[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]'
set_up_containerd 2.1 busybox debian

# root_takes_writes TYPE: the root has the file system TYPE in the guest.
root_takes_writes() {
  new_name
  nutshell "$name" --rm -- sh -euc 'grep " / " /proc/mounts | cut -d" " -f3
    mkdir -p /new/folder
    echo text >/new/file
    ln /new/file /new/folder/link
    rm -r /etc
    stat -c "%h %s" /new/folder/link
    ls -d /etc 2>&1 || true' >/run/tmp/out
  cat /run/tmp/out
  assert_equal "$1" "$(head -n 1 /run/tmp/out)"
  assert_equal "2 5" "$(sed -n 2p /run/tmp/out)"
  assert_contains "$(sed -n 3p /run/tmp/out)" "No such file or directory"
  rm /run/tmp/out
}

for snapshotter in devmapper erofs; do
  for image in busybox debian; do
    # Unpacks the image, which creates files and devices that stay.
    nutshell first --rm -- true
    basic_cases "$image, $snapshotter"
    if [[ $snapshotter == devmapper ]]; then type=ext4; else type=virtiofs; fi
    check "$image, $snapshotter: root takes writes" root_takes_writes "$type"
  done
done
finish
