#!/usr/bin/env bash
# Root file systems on disks, on containerd 2.1: containerd's blockfile snapshotter provides an ext4 image file, which
# the guest gets as a virtio-blk device and mounts itself.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"

truncate -s 64M /run/scratch.ext4
mkfs.ext4 -q /run/scratch.ext4
CONTAINERD_CONFIG='[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = "/run/scratch.ext4"
  root_path = "/run/containerd-root/blockfile"
  fs_type = "ext4"
  mount_options = []
  recreate_scratch = true'
# Small enough to be filled by a test.
mkdir -p /run/containerd-root/blockfile
mount -t tmpfs -o size=600M tmpfs /run/containerd-root/blockfile
set_up_containerd 2.1 busybox
snapshotter=blockfile

root_is_an_ext4_disk_of_the_guest() {
  new_name
  local output
  output=$(nutshell "$name" --rm -- sh -c 'grep " / " /proc/mounts; ls /sys/block')
  assert_contains "$output" "/dev/vda / ext4 rw"
}

no_fs_process_runs() {
  new_name
  nutshell "$name" -d -- sleep 1000
  assert_equal "" "$(pids_of fs)"
  remove "$name"
}

# After an orderly stop the file system is clean and contains the last writes.
writes_are_on_the_disk_after_the_delete() {
  new_name
  nutshell "$name" -d -- sh -c 'dd if=/dev/urandom of=/data bs=1M count=8 2>/dev/null; sha256sum </data >/sum; sleep 1000'
  local try file
  for try in {1..100}; do
    [[ -z $(ctr task exec --exec-id "try$try" "$name" cat /sum 2>/dev/null) ]] || break
  done
  file=$(ctr snapshot --snapshotter blockfile mounts /run/target "$name" | grep -o '/run/containerd-root/blockfile/[^ ]*')
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  ctr task delete "$name" >/dev/null 2>&1
  e2fsck -fn "$file"
  debugfs -R "cat /data" "$file" 2>/dev/null >/run/tmp/data
  debugfs -R "cat /sum" "$file" 2>/dev/null >/run/tmp/sum
  assert_equal "$(</run/tmp/sum)" "$(sha256sum </run/tmp/data)"
  rm /run/tmp/data /run/tmp/sum
  ctr container delete "$name"
}

bind_mounts_work_beside_a_disk() {
  new_name
  mkdir /run/tmp/volume
  echo of the host >/run/tmp/volume/file
  assert_equal "of the host" "$(nutshell "$name" --rm --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rw \
    -- sh -c 'cat /volume/file; echo of the guest >/volume/other')"
  assert_equal "of the guest" "$(</run/tmp/volume/other)"
  rm -r /run/tmp/volume
}

# The guest only knows that a write failed. The log of the host names the file and the cause.
full_host_disk_under_a_guests_write_is_named_in_the_log() {
  new_name
  local fill=/run/containerd-root/blockfile/fill file logged
  logged=$(stat -c %s /run/containerd.log)
  nutshell "$name" -d -- sleep 1000
  file=$(ctr snapshot --snapshotter blockfile mounts /run/target "$name" | grep -o '/run/containerd-root/blockfile/[^ ]*')
  # The snapshotter's copy has no holes.
  fallocate --dig-holes "$file"
  dd if=/dev/zero of=$fill bs=1M >/dev/null 2>&1 || true
  ! ctr task exec --exec-id write "$name" sh -c 'dd if=/dev/urandom of=/data bs=1M count=30 conv=fsync' >/dev/null 2>&1 || return 1
  rm $fill
  wait_for_log "$logged" 'disk /run/containerd-root/blockfile/[^ ]*: write at byte [0-9]* failed.*No space left on device'
  remove "$name"
}

# wait_for_log OFFSET PATTERN: waits until containerd's log has a matching line after OFFSET. Limited to 100 tries.
wait_for_log() {
  local try
  for try in {1..100}; do
    ! tail -c "+$(($1 + 1))" /run/containerd.log | grep -q -- "$2" || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "no '$2' in containerd's log" >&2
  return 1
}

check "root is an ext4 disk of the guest" root_is_an_ext4_disk_of_the_guest
check "no fs process runs" no_fs_process_runs
check "bind mounts work beside a disk" bind_mounts_work_beside_a_disk
check "exit status is exact" exit_status_is_exact
check "writes are on the disk after the delete" writes_are_on_the_disk_after_the_delete
check "full host disk under a guest's write is named in the log" full_host_disk_under_a_guests_write_is_named_in_the_log
check "missing command fails with runc's error text" missing_command_fails_with_runcs_error_text
rm /run/scratch.ext4
finish
