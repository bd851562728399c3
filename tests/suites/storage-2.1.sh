#!/usr/bin/env bash
# Gluster and NBD as volumes of containers and as disks of virtual machines, on containerd 2.1.
# Takes about 10 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"
source "$(dirname "$0")/../cases/storage.bash"

install_storage && start_gluster && start_nbd || {
  tail -n 20 /var/log/glusterfs/*.log
  echo "the storage did not start" >&2
  exit 1
}
set_up_containerd 2.1 busybox vm-raw
snapshotter=overlayfs

storage_cases
stop_nbd
stop_gluster
finish
