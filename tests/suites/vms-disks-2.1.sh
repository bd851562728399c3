#!/usr/bin/env bash
# Boots the disks of other distributions that are in a folder, on containerd 2.1 (CONTRIBUTING.md). `make` runs it only
# if NUTSHELL_TEST_DISKS is set.
#
# Environment:
#   NUTSHELL_TEST_DISKS   the folder: each *.raw, *.img or *.qcow2 in it is a disk. NAME.expect beside a disk contains a
#                         grep pattern for its console, if its boot does not end with a login prompt
#   NUTSHELL_TEST_FILTER  runs only the disks whose name contains it
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/vms.bash"

shopt -s nullglob
disks=()
for disk in "${NUTSHELL_TEST_DISKS:?the folder with the disks}"/*.{raw,img,qcow2}; do
  [[ ! ${disk##*/} == *"${NUTSHELL_TEST_FILTER:-}"* ]] || disks+=("$disk")
done
((${#disks[@]})) || {
  echo "no disk (*.raw, *.img, *.qcow2) in NUTSHELL_TEST_DISKS=$NUTSHELL_TEST_DISKS" >&2
  exit 2
}
set_up_containerd 2.1
snapshotter=overlayfs
# A boot of systemd takes minutes in the lab, an emulated machine.
console_limit=700

for disk in "${disks[@]}"; do
  check "disk ${disk##*/} boots and switches off" disk_boots_and_switches_off "$disk"
done
finish
