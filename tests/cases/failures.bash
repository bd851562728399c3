# Failures around containers: containerd, shim, guest, /dev/kvm, disks. Sourced after cases/containers.bash.

# pid_of NAME: prints the pid that containerd has for a task.
pid_of() {
  ctr task ls | awk -v name="$1" '$1 == name { print $2 }'
}

# wait_for_file FILE: waits until it exists. Limited to 300 tries.
wait_for_file() {
  local try
  for try in {1..300}; do
    [[ ! -e $1 ]] || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "$1 did not appear" >&2
  return 1
}

# within SECONDS COMMAND...: runs it, and kills it if it takes longer.
within() {
  timeout -s KILL "$@"
}

container_survives_when_containerd_is_killed() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local pid
  pid=$(pid_of "$name")
  stop_containerd KILL
  start_containerd
  assert_contains "$(ctr task ls)" RUNNING
  assert_equal "$pid" "$(pid_of "$name")"
  assert_equal inside "$(ctr task exec --exec-id one "$name" echo inside)"
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  assert_contains "$(ctr task delete "$name" 2>&1)" "exit code 137"
  ctr container delete "$name"
}

exit_while_containerd_is_down_is_reported_after_its_restart() {
  new_name
  mkdir /run/tmp/shared
  nutshell "$name" -d --mount type=bind,src=/run/tmp/shared,dst=/shared,options=rbind:rw -- \
    sh -c 'while [ ! -e /shared/go ]; do sleep 0.1; done; echo last output; touch /shared/gone; exit 42'
  stop_containerd KILL
  touch /run/tmp/shared/go
  wait_for_file /run/tmp/shared/gone
  start_containerd
  wait_for_task "$name" STOPPED
  assert_contains "$(ctr task delete "$name" 2>&1)" "exit code 42"
  ctr container delete "$name"
  rm -r /run/tmp/shared
}

# containerd finds at its start that the shim is gone, and calls `delete`.
shim_killed_while_containerd_is_down_is_cleaned_up_after_its_restart() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local shim
  shim=$(pids_of shim)
  stop_containerd KILL
  kill -9 $shim
  start_containerd
  assert_equal "" "$(pids_of vmm)$(pids_of fs)"
  remove "$name"
  rm -rf /run/containerd/fifo/*
}

# A hung guest answers no request. Calls that do not need the guest still work, and SIGKILL ends it.
hung_guest_can_be_listed_and_killed() {
  new_name
  nutshell "$name" -d -- sleep 1000
  kill -STOP "$(pids_of vmm)"
  assert_contains "$(within 5 ctr task ls)" "$name"
  within 20 ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  assert_contains "$(within 10 ctr task delete "$name" 2>&1)" "exit code 137"
  ctr container delete "$name"
}

missing_kvm_is_named() {
  new_name
  local output
  mv /dev/kvm /dev/kvm.away
  ! output=$(nutshell "$name" --rm -- true 2>&1) || return 1
  mv /dev/kvm.away /dev/kvm
  assert_contains "$output" /dev/kvm
}

device_that_is_not_kvm_is_named() {
  new_name
  local output
  mount --bind /dev/null /dev/kvm
  ! output=$(nutshell "$name" --rm -- true 2>&1) || return 1
  umount /dev/kvm
  assert_contains "$output" /dev/kvm
}

# The file system of a bind mount is full: only the program that writes to it gets an error.
full_disk_fails_only_the_process_that_writes() {
  new_name
  mkdir /run/tmp/small
  mount -t tmpfs -o size=1M tmpfs /run/tmp/small
  assert_equal "No space left on device" "$(nutshell "$name" --rm \
    --mount type=bind,src=/run/tmp/small,dst=/small,options=rbind:rw -- \
    sh -c 'dd if=/dev/zero of=/small/x bs=64k count=100 2>&1 | grep -o "No space left on device"; rm /small/x')"
  umount /run/tmp/small
  rmdir /run/tmp/small
}

# The file system of the shim's state folder is full. The container may start or fail; if it fails, the error names the
# cause, and nothing is left.
full_state_folder_is_reported_and_leaves_nothing() {
  new_name
  local status=0 size
  size=$(df --output=size -B 1 /run | tail -n 1)
  # A smaller file system is faster to fill.
  mount -o remount,size=$(($(df --output=used -B 1 /run | tail -n 1) + (8 << 20))) /run
  dd if=/dev/zero of=/run/check.fill bs=64k >/dev/null 2>&1 || true
  within 60 ctr run --rm --snapshotter "$snapshotter" --runtime "$runtime" "localhost/$image:latest" "$name" true \
    >/dev/shm/output 2>&1 || status=$?
  rm /run/check.fill
  mount -o "remount,size=$size" /run
  if ((status)); then
    assert_contains "$(</dev/shm/output)" "o space left on device"
  fi
  rm /dev/shm/output
  ctr task delete --force "$name" >/dev/null 2>&1 || true
  ctr container delete "$name" >/dev/null 2>&1 || true
  ctr snapshot --snapshotter "$snapshotter" rm "$name" >/dev/null 2>&1 || true
}

# wait_until_blocked PID: waits until a thread of the process is in an uninterruptible wait. Limited to 300 tries.
wait_until_blocked() {
  local try
  for try in {1..300}; do
    ! grep -q '^State:[[:space:]]*D' /proc/"$1"/task/*/status || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "process $1 is not blocked" >&2
  return 1
}

# A process in the guest waits for a volume that hangs, and so does its file server: SIGKILL ends neither.
container_that_waits_for_a_hung_volume_can_be_killed_and_deleted() {
  new_name
  local server
  truncate -s 16M /run/tmp/volume
  mkfs.ext4 -q /run/tmp/volume
  mkdir /run/tmp/hung
  mount -o loop /run/tmp/volume /run/tmp/hung
  trap 'fsfreeze -u /run/tmp/hung 2>/dev/null || true' EXIT
  nutshell "$name" -d --mount type=bind,src=/run/tmp/hung,dst=/hung,options=rbind:rw -- \
    sh -c 'while :; do echo text >/hung/file; done'
  server=$(pids_of fs)
  wait_for_file /run/tmp/hung/file
  fsfreeze -f /run/tmp/hung
  wait_until_blocked "$server"

  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  # Neither the shim nor containerd's call of `delete` waits long for a process that cannot end.
  assert_contains "$(within 7 ctr task delete "$name" 2>&1)" "exit code 137"
  ctr container delete "$name"
  assert_equal "" "$(pids_of vmm)"
  assert_equal "$server" "$(pids_of fs)"
  grep -q "SIGKILL did not end its container because these processes are blocked in the guest's kernel (sh with" \
    /run/containerd.log
  grep -q "the file server process $server does not end after SIGKILL" /run/containerd.log

  fsfreeze -u /run/tmp/hung
  tail --pid="$server" -f /dev/null
  # The shim has ended before the file server could. The next one removes the control group.
  [[ -d /sys/fs/cgroup/default/$name ]]
  local old=$name
  new_name
  nutshell "$name" --rm -- true
  [[ ! -e /sys/fs/cgroup/default/$old ]]
  umount /run/tmp/hung
  rm -r /run/tmp/hung /run/tmp/volume
}

hung_volume_cases() {
  check "container that waits for a hung volume can be killed and deleted" \
    container_that_waits_for_a_hung_volume_can_be_killed_and_deleted
}

failure_cases() {
  check "container survives when containerd is killed" container_survives_when_containerd_is_killed
  check "exit while containerd is down is reported after its restart" exit_while_containerd_is_down_is_reported_after_its_restart
  check "shim killed while containerd is down is cleaned up after its restart" \
    shim_killed_while_containerd_is_down_is_cleaned_up_after_its_restart
  check "container of a hung guest can be listed and killed" hung_guest_can_be_listed_and_killed
  check "missing /dev/kvm is named in the error" missing_kvm_is_named
  check "/dev/kvm that is not KVM is named in the error" device_that_is_not_kvm_is_named
  check "full disk fails only the process that writes" full_disk_fails_only_the_process_that_writes
  check "full state folder is reported and nothing is left behind" full_state_folder_is_reported_and_leaves_nothing
}
