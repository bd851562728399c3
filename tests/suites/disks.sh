#!/usr/bin/env bash
# Root file systems on disks, on containerd 2.1: containerd's blockfile snapshotter provides an ext4 image file, which
# the guest gets as a virtio-blk device and mounts itself.
#
# Environment:
#   NUTSHELL_TEST_CRASHES  how often a vmm is killed during synced writes; default: 3
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/network.bash"

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
# The first network namespace creates mounts that stay: they must exist before the first check.
ip netns add first
ip netns del first

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

# The container reports each number after it has synced a file with it to its disk and to a volume.
killed_vmm_loses_no_synced_write() {
  local round file reported path
  mkdir /run/tmp/volume /run/tmp/disk
  for ((round = 0; round < ${NUTSHELL_TEST_CRASHES:-3}; round++)); do
    new_name
    nutshell "$name" -d --log-uri file:///run/tmp/reported \
      --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rw -- sh -euc '
        number=0
        while true; do
          for folder in /root /volume; do
            seq $number $((number + 9999)) | dd of=$folder/$number conv=fsync 2>/dev/null
          done
          echo $number
          number=$((number + 1))
        done'
    wait_for_lines /run/tmp/reported $((RANDOM % 20 + 1))
    file=$(ctr snapshot --snapshotter blockfile mounts /run/target "$name" | grep -o '/run/containerd-root/blockfile/[^ ]*')
    kill -9 $(pids_of vmm)
    wait_for_task "$name" STOPPED
    reported=$(wc -l </run/tmp/reported)
    echo "round $round: $reported files"

    mount -o loop "$file" /run/tmp/disk
    for ((number = 0; number < reported; number++)); do
      for path in "/run/tmp/disk/root/$number" "/run/tmp/volume/$number"; do
        cmp "$path" <(seq "$number" $((number + 9999)))
      done
    done
    umount /run/tmp/disk
    e2fsck -fn "$file"
    remove "$name"
    rm -r /run/tmp/volume/* /run/tmp/reported
  done
  rmdir /run/tmp/volume /run/tmp/disk
}

# wait_for_lines FILE COUNT: waits until the file has so many lines. Limited to 300 tries.
wait_for_lines() {
  local try
  for try in {1..300}; do
    [[ ! -e $1 ]] || (($(wc -l <"$1") < $2)) || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "$1 does not have $2 lines" >&2
  return 1
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
  wait_for_log "$logged" 'disk /run/containerd-root/blockfile/[^ ]*: queue 0: write at byte [0-9]* failed.*No space left on device'
  remove "$name"
}

# counter METRICS FAMILY DEVICE: prints a counter of the container $name.
counter() {
  sed -n "s|^$2_total{namespace=\"default\",sandbox=\"$name\",device=\"$3\"} ||p" <<<"$1"
}

# Four MiB and three pings. A vmm that does not answer does not delay the rest.
administrator_sees_what_the_devices_have_done() {
  make_network
  new_name
  local inspected metrics vmm start
  nutshell "$name" -d --with-ns network:/run/netns/pod -- sleep 1000
  ctr task exec --exec-id io "$name" sh -c \
    'dd if=/dev/urandom of=/data bs=1M count=4 conv=fsync 2>/dev/null; for i in 1 2 3; do ping -c 1 -W 5 10.77.0.1 || exit; done' >/dev/null
  inspected=$(containerd-shim-nutshell-v2 inspect "$name")
  echo "$inspected"
  grep -q '^nutshell-0  *[1-9][0-9]*  *0  *0  *[1-9][0-9]*  *[1-9][0-9]*  */run/containerd-root/blockfile/' <<<"$inspected"
  local phase
  for phase in spawn "vmm ready" kernel "agent ready" created started; do
    grep -q "^$phase:  *[0-9]* ms$" <<<"$inspected"
  done
  metrics=$(containerd-shim-nutshell-v2 metrics)
  echo "$metrics"
  (($(counter "$metrics" nutshell_device_from_guest_bytes nutshell-0) >= 4 << 20))
  (($(counter "$metrics" nutshell_device_requests net-0) >= 6))
  (($(counter "$metrics" nutshell_device_to_guest_bytes net-0) >= 3 * 98))
  assert_equal 0 "$(counter "$metrics" nutshell_device_errors nutshell-0)"
  assert_contains "$metrics" "# TYPE nutshell_device_stalls counter"
  assert_equal "# EOF" "$(tail -n 1 <<<"$metrics")"
  vmm=$(sed -n 's/^vmm:  *//p' <<<"$inspected")
  kill -STOP "$vmm"
  start=$SECONDS
  inspected=$(containerd-shim-nutshell-v2 inspect "$name")
  kill -CONT "$vmm"
  ((SECONDS - start <= 3))
  assert_contains "$inspected" "devices:          not known, the vmm gave no answer: the vmm did not answer within 1 s"
  assert_contains "$inspected" "state:            running"
  remove "$name"
  remove_network
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
check "killed vmm loses no synced write" killed_vmm_loses_no_synced_write
check "full host disk under a guest's write is named in the log" full_host_disk_under_a_guests_write_is_named_in_the_log
check "administrator sees what the devices have done" administrator_sees_what_the_devices_have_done
check "missing command fails with runc's error text" missing_command_fails_with_runcs_error_text
rm /run/scratch.ext4
finish
